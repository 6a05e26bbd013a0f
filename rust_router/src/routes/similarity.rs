//! The similarity of a sample's pathway to a mask, or to its pathway under another condition. It is
//! measured by intersection over union (IoU) and by the cosine of the two sets of channels.

use crate::routes::channels::{Channels, ExpertPairs, overlap, sum};
use crate::routes::error::{Error, Result};
use crate::routes::log::Table;
use crate::routes::pathways;

/// |A ∩ B| / |A ∪ B|, in [0, 1]. It is 1 for two empty sets.
pub(crate) fn iou(intersection: u32, a: u32, b: u32) -> f64 {
    let union = a + b - intersection;
    if union == 0 { 1.0 } else { f64::from(intersection) / f64::from(union) }
}

/// |A ∩ B| / √(|A| |B|), the cosine of the two indicator vectors, in [0, 1]. It is 0 if one of the sets is empty.
fn cosine(intersection: u32, a: u32, b: u32) -> f64 {
    let norms = (f64::from(a) * f64::from(b)).sqrt();
    if norms == 0.0 { 0.0 } else { f64::from(intersection) / norms }
}

/// IoU and cosine of each row's pathway with a mask over the channels of all layers, in the order
/// of the table.
///
/// # Errors
/// Channels and table have different layers, or the mask does not have one entry per channel.
pub fn with_mask(table: &Table, channels: &Channels, mask: &[bool]) -> Result<(Vec<f64>, Vec<f64>)> {
    channels.check(table)?;
    if mask.len() != channels.num_channels() {
        return Err(Error::MaskLength { expected: channels.num_channels(), got: mask.len() });
    }
    let sizes = channels.sizes();
    let shared = channels.by_expert(|start, expert| overlap(expert, &mask[start..]));
    let mask_size = overlap(mask, mask);
    let mut ious = Vec::with_capacity(table.len());
    let mut cosines = Vec::with_capacity(table.len());
    for pathway in table.rows().experts.chunks_exact(table.num_layers()) {
        let (size, intersection) = (sum(&sizes, pathway)?, sum(&shared, pathway)?);
        ious.push(iou(intersection, size, mask_size));
        cosines.push(cosine(intersection, size, mask_size));
    }
    Ok((ious, cosines))
}

/// The indices of the samples that both tables have, and the IoU of the two pathways of each.
///
/// # Errors
/// Channels and tables have different layers, or the tables have no common sample.
pub fn between(a: &Table, b: &Table, channels: &Channels) -> Result<(Vec<i64>, Vec<f64>)> {
    channels.check(a)?;
    let sizes = channels.sizes();
    let pairs = ExpertPairs::new(channels);
    let mut indices = Vec::new();
    let mut ious = Vec::new();
    for (ours, theirs) in pathways::matches(a, b) {
        let (p, q) = (a.pathway(ours), b.pathway(theirs));
        let (p_size, q_size) = (sum(&sizes, p)?, sum(&sizes, q)?);
        indices.push(a.rows().indices[ours]);
        ious.push(iou(pairs.intersection(p, q), p_size, q_size));
    }
    if indices.is_empty() {
        return Err(Error::NothingInCommon);
    }
    Ok((indices, ious))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::channels::tests::{mask, slow_iou, table, windows};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn similarity_with_a_mask_is_that_of_the_written_out_pathway(experts in proptest::collection::vec(0..2_u8, 8), bits: u64) {
            let num_experts = [2, 2, 2, 2];
            let (table, channels) = (table(&num_experts, &experts), windows(&num_experts, true));
            let mask_bits: Vec<bool> = (0..channels.num_channels()).map(|c| bits >> c & 1 == 1).collect();
            let (ious, cosines) = with_mask(&table, &channels, &mask_bits).unwrap();
            for row in 0..2 {
                let pathway = mask(&channels, table.pathway(row));
                let (shared, union) = slow_iou(&pathway, &mask_bits);
                prop_assert_eq!(ious[row], f64::from(shared) / f64::from(union));
                let norms = (f64::from(overlap(&pathway, &pathway)) * f64::from(overlap(&mask_bits, &mask_bits))).sqrt();
                prop_assert_eq!(cosines[row], if norms == 0.0 { 0.0 } else { f64::from(shared) / norms });
            }
        }
    }

    #[test]
    fn the_pathways_of_common_samples_are_compared() {
        let channels = windows(&[2, 2], false);
        // Experts have 2 of 5 channels in layer 0, and 3 of 7 in layer 1. In both layers the two
        // experts have no common channel.
        let (before, after) = (table(&[2, 2], &[0, 0, 0, 1, 1, 1]), table(&[2, 2], &[0, 0, 1, 1]));
        // Sample 1 goes 01 -> 11 and keeps the 3 of layer 1, of 2 + 3 + 2 in either pathway; sample
        // 2 is not in both.
        assert_eq!(between(&before, &after, &channels).unwrap(), (vec![0, 1], vec![1.0, 3.0 / 7.0]));
    }
}
