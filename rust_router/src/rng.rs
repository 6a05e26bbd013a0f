//! Counter-based random numbers: Philox4x64-10 (Salmon et al., *Parallel random numbers: as easy as
//! 1, 2, 3*, SC 2011).
//!
//! A random number is a pure function of (seed, stream, purpose, epoch, index). Its value therefore
//! does not depend on the thread that computes it, or on the order of computation. The key is
//! `[seed, stream]`. The counter is `[block, index, epoch, purpose]`, with blocks counted from 1.
//! `numpy.random.Philox(key=[seed, stream], counter=[0, index, epoch, purpose]).random_raw()`
//! returns the same words, because NumPy increments the counter before it computes the first block.

use std::collections::TryReserveError;

/// The use of a random word. Each purpose has its own counters, so no two decisions share a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// The order of an epoch.
    Shuffle = 0,
    /// The crop of an image.
    Crop = 1,
    /// Whether an image is mirrored.
    Flip = 2,
    /// The pairs of samples that are compared.
    Pairs = 3,
}

/// The random numbers of one data stream. `seed` identifies the experiment, and `stream` one of its
/// independent sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// First half of the key.
    pub seed: u64,
    /// Second half of the key.
    pub stream: u64,
}

impl Stream {
    /// Four random words: block number `block` (from 0) for one purpose, epoch and index.
    #[must_use]
    pub fn block(self, purpose: Purpose, epoch: u64, index: u64, block: u64) -> [u64; 4] {
        philox([block.wrapping_add(1), index, epoch, purpose as u64], [self.seed, self.stream])
    }

    /// The order of an epoch: the positions `0..len`, sorted by one random word each. Equal words
    /// keep their order.
    ///
    /// Position `p` uses word `p % 4` of block `p / 4` of index 0. NumPy's `argsort(Philox(key,
    /// counter=[0, 0, epoch, 0]).random_raw(len), kind="stable")` is the same permutation.
    ///
    /// # Errors
    /// The memory of `len` positions and words is not available.
    pub fn permutation(self, epoch: u64, len: usize) -> Result<Vec<i64>, TryReserveError> {
        let words = (0..).flat_map(|block| self.block(Purpose::Shuffle, epoch, 0, block));
        let mut keyed: Vec<(u64, i64)> = Vec::new();
        keyed.try_reserve_exact(len)?;
        keyed.extend(words.zip(0..).take(len));
        keyed.sort_unstable();
        Ok(keyed.into_iter().map(|(_, position)| position).collect())
    }
}

/// An integer in `0..bound`, uniform up to a bias of at most `bound / 2^64`.
#[must_use]
pub fn below(word: u64, bound: u64) -> u64 {
    widening_mul(word, bound).0
}

/// A float in [0, 1) with 53 random bits, the same as NumPy's `Generator.random`.
#[must_use]
pub fn unit(word: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in an f64")]
    let bits = (word >> 11) as f64;
    bits / 9_007_199_254_740_992.0 // 2^53
}

/// Ten Philox rounds on four 64-bit words.
#[must_use]
pub fn philox(mut counter: [u64; 4], mut key: [u64; 2]) -> [u64; 4] {
    const ROUNDS: usize = 10;
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9_7F4A_7C15), key[1].wrapping_add(0xBB67_AE85_84CA_A73B)];
        }
        let (high0, low0) = widening_mul(0xD2E7_470E_E14C_6C93, counter[0]);
        let (high1, low1) = widening_mul(0xCA5A_8263_9512_1157, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

#[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
fn widening_mul(a: u64, b: u64) -> (u64, u64) {
    let product = u128::from(a) * u128::from(b);
    ((product >> 64) as u64, product as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Known-answer tests of the Random123 distribution (kat_vectors, "philox4x64 10").
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x16554d9eca36314c, 0xdb20fe9d672d0fdc, 0xd7e772cee186176b, 0x7e68b68aec7ba23b]
        );
        assert_eq!(
            philox([u64::MAX; 4], [u64::MAX; 2]),
            [0x87b092c3013fe90b, 0x438c3c67be8d0224, 0x9cc7d7c69cd777b6, 0xa09caebf594f0ba0]
        );
        assert_eq!(
            philox(
                [0x243f6a8885a308d3, 0x13198a2e03707344, 0xa4093822299f31d0, 0x082efa98ec4e6c89],
                [0x452821e638d01377, 0xbe5466cf34e90c6c]
            ),
            [0xa528f45403e61d95, 0x38c72dbd566e9788, 0xa5a1610e72fd18b5, 0x57bd43b5e52b7fe6]
        );
    }

    proptest! {
        #[test]
        fn a_permutation_holds_every_position_once(seed: u64, stream: u64, epoch: u64, len in 0..300_usize) {
            let mut order = Stream { seed, stream }.permutation(epoch, len).unwrap();
            order.sort_unstable();
            prop_assert!(order.into_iter().eq(0..i64::try_from(len).unwrap()));
        }

        #[test]
        fn draws_stay_in_range(word: u64, bound in 1..u64::MAX) {
            prop_assert!(below(word, bound) < bound);
            prop_assert!((0.0..1.0).contains(&unit(word)));
        }
    }

    #[test]
    fn an_order_that_no_memory_holds_is_an_error() {
        let stream = Stream { seed: 0, stream: 0 };
        assert!(stream.permutation(0, 1 << 62).is_err());
    }

    #[test]
    fn streams_epochs_and_seeds_have_orders_of_their_own() {
        let order = |seed, stream, epoch| Stream { seed, stream }.permutation(epoch, 100).unwrap();
        let first = order(0, 0, 0);
        assert_eq!(first, order(0, 0, 0));
        for other in [order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)] {
            assert_ne!(first, other);
        }
    }
}
