//! The diversity of pathways: their IoU over all pairs of samples.
//!
//! Equal pathways are merged first. Consecutive layers with at most 256 combinations of experts
//! need one table look-up per pair.

use crate::rng::{Purpose, Stream, below};
use crate::routes::channels::{Channels, ExpertPairs, sum};
use crate::routes::error::{Error, MAX_BINS, Result};
use crate::routes::log::Table;
use crate::routes::pathways;
use crate::routes::similarity::iou;

/// Differences between the pathways of different samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Diversity {
    /// Number of pairs of samples by IoU, in bins of equal width from 0 to 1. The last bin includes
    /// 1.
    pub histogram: Vec<u64>,
    /// Number of pairs in the histogram.
    pub pairs: u64,
    /// Whether the histogram contains all pairs, and not a random sample of pairs.
    pub exact: bool,
    /// Mean IoU of the pairs in the histogram.
    pub mean_iou: f64,
    /// Mean |P ∩ Q| over all pairs of samples. It is exact in both cases.
    pub mean_intersection: f64,
}

/// The number of pairs that are compared.
#[derive(Clone, Copy, Debug)]
pub struct PairBudget {
    /// Highest number of pairs of distinct pathways that are all compared. If there are more, pairs
    /// are sampled.
    pub max_exact: u64,
    /// Number of sampled pairs of samples.
    pub sampled: u64,
    /// Seed of the sampling.
    pub seed: u64,
}

/// The diversity of the pathways of a table. Time grows with the square of the number of distinct
/// pathways, and not with the square of the number of samples.
///
/// # Errors
/// Channels and table have different layers, there are fewer than two samples, `num_bins` is not in
/// 1..=2^20, or pairs would be sampled and `budget.sampled` is 0.
pub fn diversity(table: &Table, channels: &Channels, num_bins: usize, budget: PairBudget) -> Result<Diversity> {
    channels.check(table)?;
    if table.len() < 2 {
        return Err(Error::TooFewSamples { num_samples: table.len() });
    }
    if !(1..=MAX_BINS).contains(&num_bins) {
        return Err(Error::NumBins { num_bins });
    }
    let num_samples = table.len() as u64;
    let unique = pathways::unique(table);
    let sizes = channels.sizes();
    let pairs = ExpertPairs::new(channels);
    let unique_sizes = unique.iter().map(|(pathway, _)| sum(&sizes, pathway)).collect::<Result<Vec<u32>>>()?;
    let distinct = unique.len() as u64;
    let mut tally = Tally::new(num_bins);
    let exact = distinct * (distinct - 1) / 2 <= budget.max_exact;
    if !exact && budget.sampled == 0 {
        return Err(Error::NoPairs);
    }
    if exact {
        let grouped = Grouped::new(&pairs, &unique);
        grouped.tally(&unique, &unique_sizes, &mut tally);
    } else {
        let stream = Stream { seed: budget.seed, stream: 0 };
        for draw in 0..budget.sampled {
            let [first, second, ..] = stream.block(Purpose::Pairs, 0, draw, 0);
            let first = below(first, num_samples);
            let second = (first + 1 + below(second, num_samples - 1)) % num_samples;
            let (p, q) = (table.pathway(first as usize), table.pathway(second as usize));
            tally.add(pairs.intersection(p, q), sum(&sizes, p)?, sum(&sizes, q)?, 1);
        }
    }
    let mean_intersection = mean_intersection(table, &pairs)?;
    let (histogram, pairs) = (tally.histogram, tally.pairs);
    Ok(Diversity { histogram, pairs, exact, mean_iou: tally.iou_sum / pairs as f64, mean_intersection })
}

/// Mean of |P ∩ Q| over all pairs of samples. Experts e and f of a layer contribute |e ∩ f| for n_e
/// · n_f pairs, where n_e samples took e; e = f contributes for n_e (n_e − 1) / 2 pairs.
fn mean_intersection(table: &Table, pairs: &ExpertPairs) -> Result<f64> {
    let max_experts = pairs.layers.iter().map(|(n, _)| *n).max().unwrap_or(1);
    let load = pathways::load(table, 1, max_experts)?;
    let mut total = 0_u128;
    for ((n, shared), load) in pairs.layers.iter().zip(load.chunks_exact(max_experts)) {
        for (e, f) in (0..*n).flat_map(|e| (e..*n).map(move |f| (e, f))) {
            let count = |expert: usize| u128::from(load[expert]);
            let both = if e == f { count(e) * count(e).saturating_sub(1) / 2 } else { count(e) * count(f) };
            total += both * u128::from(shared[e * n + f]);
        }
    }
    let samples = table.len() as f64;
    Ok(total as f64 / (samples * (samples - 1.0) / 2.0))
}

/// A histogram of IoU that is being filled.
struct Tally {
    histogram: Vec<u64>,
    pairs: u64,
    iou_sum: f64,
}

impl Tally {
    fn new(num_bins: usize) -> Self {
        Self { histogram: vec![0; num_bins], pairs: 0, iou_sum: 0.0 }
    }

    /// Counts `weight` pairs of sets. The rounding of a ratio of such small integers does not cross
    /// the edge of a bin, so the bin equals that of exact arithmetic.
    #[inline]
    fn add(&mut self, intersection: u32, a: u32, b: u32, weight: u64) {
        let iou = iou(intersection, a, b);
        let union = f64::from((a + b - intersection).max(1));
        let bins = self.histogram.len();
        let bin = if iou >= 1.0 { bins - 1 } else { (f64::from(intersection) * bins as f64 / union) as usize };
        self.histogram[bin.min(bins - 1)] += weight;
        self.pairs += weight;
        self.iou_sum += iou * weight as f64;
    }
}

/// Pathways encoded with one byte per group of consecutive layers that have at most 256
/// combinations of experts.
struct Grouped {
    groups: Vec<Group>,
}

struct Group {
    /// The byte of each pathway.
    codes: Vec<u8>,
    /// |p ∩ q| within the group, `[code, 256]`.
    shared: Vec<[u32; 256]>,
}

impl Grouped {
    fn new(pairs: &ExpertPairs, unique: &[(&[u8], u64)]) -> Self {
        let mut groups = Vec::new();
        let mut start = 0;
        while start < pairs.layers.len() {
            let mut end = start;
            let mut combinations = 1;
            while let Some((n, _)) = pairs.layers.get(end)
                && combinations * n <= 256
            {
                combinations *= n;
                end += 1;
            }
            groups.push(Group::new(&pairs.layers[start..end], start, combinations, unique));
            start = end;
        }
        Self { groups }
    }

    /// Adds all pairs of samples: pairs with equal pathways, and pairs with different pathways.
    fn tally(&self, unique: &[(&[u8], u64)], sizes: &[u32], tally: &mut Tally) {
        const BLOCK: usize = 1024;
        let mut shared = [0_u32; BLOCK];
        // If all pathways have the same number of channels, the IoU of a pair depends on |P ∩ Q|
        // only, so it suffices to count the pairs by |P ∩ Q|.
        let one_size = sizes.iter().all(|size| *size == sizes[0]);
        let mut by_intersection = vec![0_u64; if one_size { sizes[0] as usize + 1 } else { 0 }];
        for (p, (&(_, p_count), &p_size)) in unique.iter().zip(sizes).enumerate() {
            tally.add(p_size, p_size, p_size, p_count * (p_count - 1) / 2);
            for start in (p + 1..unique.len()).step_by(BLOCK) {
                let end = (start + BLOCK).min(unique.len());
                let shared = &mut shared[..end - start];
                shared.fill(0);
                for group in &self.groups {
                    let row = &group.shared[usize::from(group.codes[p])];
                    for (shared, &code) in shared.iter_mut().zip(&group.codes[start..end]) {
                        *shared += row[usize::from(code)];
                    }
                }
                let pairs =
                    shared.iter().zip(&unique[start..end]).map(|(&shared, (_, q_count))| (shared, p_count * q_count));
                if one_size {
                    pairs.for_each(|(shared, weight)| by_intersection[shared as usize] += weight);
                } else {
                    pairs
                        .zip(&sizes[start..end])
                        .for_each(|((shared, w), &q_size)| tally.add(shared, p_size, q_size, w));
                }
            }
        }
        for (shared, &weight) in (0..).zip(&by_intersection) {
            tally.add(shared, sizes[0], sizes[0], weight);
        }
    }
}

impl Group {
    fn new(layers: &[(usize, Vec<u32>)], start: usize, combinations: usize, unique: &[(&[u8], u64)]) -> Self {
        let code = |pathway: &[u8]| {
            let digits = layers.iter().zip(&pathway[start..]);
            digits.fold(0, |code, ((n, _), &expert)| code * n + usize::from(expert))
        };
        let codes = unique.iter().map(|(pathway, _)| code(pathway) as u8).collect();
        let pair = |mut a: usize, mut b: usize| {
            let mut shared = 0;
            for (n, table) in layers.iter().rev() {
                shared += table[(a % n) * n + b % n];
                (a, b) = (a / n, b / n);
            }
            shared
        };
        let row = |a| {
            let mut row = [0; 256];
            row.iter_mut().take(combinations).enumerate().for_each(|(b, shared)| *shared = pair(a, b));
            row
        };
        Self { codes, shared: (0..combinations).map(row).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::channels::tests::{mask, slow_iou, table, windows};
    use proptest::prelude::*;

    const BUDGET: PairBudget = PairBudget { max_exact: u64::MAX, sampled: 0, seed: 0 };

    proptest! {
        #[test]
        fn diversity_is_that_of_all_pairs_of_written_out_masks(
            num_experts in proptest::collection::vec(1..20_u16, 1..6),
            raw in proptest::collection::vec(any::<u8>(), 12..120),
            bins in 1..12_usize,
            uneven: bool,
        ) {
            let layers = num_experts.len();
            let n = raw.len() / layers;
            let experts: Vec<u8> =
                (0..n * layers).map(|i| (u16::from(raw[i]) % num_experts[i % layers].min(3)) as u8).collect();
            let (table, channels) = (table(&num_experts, &experts), windows(&num_experts, uneven));
            let mut histogram = vec![0; bins];
            let (mut intersections, mut ious, mut pairs) = (0, 0.0, 0);
            for (i, j) in (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))) {
                let masks = [i, j].map(|row| mask(&channels, table.pathway(row)));
                let (shared, union) = slow_iou(&masks[0], &masks[1]);
                histogram[(shared as usize * bins / union as usize).min(bins - 1)] += 1;
                intersections += shared;
                ious += f64::from(shared) / f64::from(union);
                pairs += 1;
            }
            let got = diversity(&table, &channels, bins, BUDGET).unwrap();
            prop_assert_eq!(got.histogram, histogram);
            prop_assert_eq!((got.pairs, got.exact), (pairs, true));
            prop_assert!((got.mean_iou - ious / pairs as f64).abs() < 1e-12);
            prop_assert!((got.mean_intersection - f64::from(intersections) / pairs as f64).abs() < 1e-9);
        }
    }

    #[test]
    fn disjoint_halves_share_what_their_layers_share() {
        let mut channels = Channels::new();
        for _ in 0..2 {
            channels.push(vec![true, true, false, false, false, false, true, true], 4).unwrap();
        }
        // Pathways 00, 00, 01, 11. Of the six pairs, one is equal (IoU 1), three differ in one
        // layer (2 / 6), and two differ in both layers (0).
        let table = table(&[2, 2], &[0, 0, 0, 0, 0, 1, 1, 1]);
        let got = diversity(&table, &channels, 3, BUDGET).unwrap();
        assert_eq!(got.histogram, [2, 3, 1]);
        assert_eq!(got.mean_intersection, (4.0 + 3.0 * 2.0) / 6.0);
    }

    #[test]
    fn a_sample_of_no_pairs_is_refused() {
        let (table, channels) = (table(&[2], &[0, 1]), windows(&[2], false));
        let none = PairBudget { max_exact: 0, sampled: 0, seed: 0 };
        let message = diversity(&table, &channels, 4, none).unwrap_err().to_string();
        assert_eq!(message, "expected at least 1 sampled pair, got 0");
    }

    #[test]
    fn sampled_pairs_tend_to_all_pairs() {
        let num_experts = [2; 10];
        let experts: Vec<u8> = (0..300_u64)
            .flat_map(|row| {
                let word = Stream { seed: 1, stream: 0 }.block(Purpose::Crop, 0, row, 0)[0];
                (0..10).map(move |layer| (word >> layer & 1) as u8)
            })
            .collect();
        let (table, channels) = (table(&num_experts, &experts), windows(&num_experts, true));
        let exact = diversity(&table, &channels, 4, BUDGET).unwrap();
        let sampled = diversity(&table, &channels, 4, PairBudget { max_exact: 0, sampled: 40_000, seed: 3 }).unwrap();
        assert!(!sampled.exact && sampled.pairs == 40_000);
        // The deviation of a mean of 40,000 IoUs, each of deviation below 0.5, is below 0.0025.
        assert!((sampled.mean_iou - exact.mean_iou).abs() < 0.01);
        assert_eq!(sampled.mean_intersection, exact.mean_intersection);
    }
}
