//! Statistics of route tables: expert load, distinct pathways, and differences between two
//! conditions.

use std::collections::HashMap;

use crate::routes::error::{Error, MAX_CLASSES, Result};
use crate::routes::log::Table;

/// Number of samples of each class that each expert got, `[layer, class, expert]`. If `num_classes`
/// is 1, labels are ignored.
///
/// A layer with fewer than `max_experts` experts is padded with zeros.
///
/// # Errors
/// `num_classes` is 0 or above [`MAX_CLASSES`], or it is above 1 and a label is unknown or too
/// large. The counts do not fit in memory.
pub fn load(table: &Table, num_classes: usize, max_experts: usize) -> Result<Vec<u64>> {
    if !(1..=MAX_CLASSES).contains(&num_classes) {
        return Err(Error::NumClasses { num_classes });
    }
    let rows = table.rows();
    let too_many = || Error::Counts { num_layers: table.num_layers(), num_classes, max_experts };
    let num_counts = table.num_layers().checked_mul(num_classes).and_then(|n| n.checked_mul(max_experts));
    let num_counts = num_counts.ok_or_else(too_many)?;
    let mut counts: Vec<u64> = Vec::new();
    counts.try_reserve_exact(num_counts).map_err(|_| too_many())?;
    counts.resize(num_counts, 0);
    for (row, &label) in rows.labels.iter().enumerate() {
        let class = if num_classes == 1 { Some(0) } else { usize::try_from(label).ok().filter(|&l| l < num_classes) };
        let class = class.ok_or(Error::Label { last: num_classes - 1, label, index: rows.indices[row] })?;
        for (layer, &expert) in table.pathway(row).iter().enumerate() {
            counts[(layer * num_classes + class) * max_experts + usize::from(expert)] += 1;
        }
    }
    Ok(counts)
}

/// Distinct pathways, each with its number of samples. They are sorted by descending number, then
/// by their experts.
#[must_use]
pub fn unique(table: &Table) -> Vec<(&[u8], u64)> {
    let mut counts: HashMap<&[u8], u64> = HashMap::new();
    for row in 0..table.len() {
        *counts.entry(table.pathway(row)).or_default() += 1;
    }
    let mut unique: Vec<(&[u8], u64)> = counts.into_iter().collect();
    unique.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
    unique
}

/// Differences in the routing of the same samples between two conditions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Number of samples that both conditions have.
    pub matched: u64,
    /// Number of samples with another expert, by layer.
    pub changed_by_layer: Vec<u64>,
    /// Number of samples with 0, 1, ... changed layers.
    pub by_num_changed: Vec<u64>,
    /// Number of samples by (router survives, prediction is correct) under the second condition:
    /// yes-yes, no-yes, yes-no, no-no. These are the classes 1 to 4 of the paper (Figs. 4 and 5).
    /// The last number counts samples whose label or prediction is unknown.
    pub outcomes: [u64; 5],
}

/// Pairs (row in `a`, row in `b`) of the samples that both tables have.
pub fn matches<'a>(a: &'a Table, b: &'a Table) -> impl Iterator<Item = (usize, usize)> + 'a {
    let (ours, theirs) = (a.rows().indices, b.rows().indices);
    let mut other = 0;
    ours.iter().enumerate().filter_map(move |(row, index)| {
        while theirs.get(other).is_some_and(|their| their < index) {
            other += 1;
        }
        (theirs.get(other) == Some(index)).then_some((row, other))
    })
}

/// Compares the routing under two conditions, sample by sample. Predictions are taken from `b`.
/// `None` if the tables have no common sample.
#[must_use]
pub fn compare(a: &Table, b: &Table) -> Option<Comparison> {
    let num_layers = a.num_layers();
    let mut result = Comparison {
        changed_by_layer: vec![0; num_layers],
        by_num_changed: vec![0; num_layers + 1],
        ..Comparison::default()
    };
    let (labels, rows) = (a.rows().labels, b.rows());
    for (ours, theirs) in matches(a, b) {
        result.matched += 1;
        let mut changed = 0;
        let layers = a.pathway(ours).iter().zip(b.pathway(theirs));
        for ((before, after), count) in layers.zip(&mut result.changed_by_layer) {
            let differs = before != after;
            *count += u64::from(differs);
            changed += usize::from(differs);
        }
        result.by_num_changed[changed] += 1;
        let label = if rows.labels[theirs] < 0 { labels[ours] } else { rows.labels[theirs] };
        let prediction = rows.predictions[theirs];
        let outcome = match (label >= 0 && prediction >= 0, prediction == label, changed == 0) {
            (false, ..) => 4,
            (true, right, survives) => 2 * usize::from(!right) + usize::from(!survives),
        };
        result.outcomes[outcome] += 1;
    }
    (result.matched > 0).then_some(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::key::Key;
    use crate::routes::log::{RouteLog, Rows};

    fn key(condition: &str) -> Key {
        Key { condition: condition.into(), epoch: 0 }
    }

    /// A model of two layers: three clean samples of two classes; the same samples and a fourth one
    /// under an attack.
    fn log() -> RouteLog {
        let mut log = RouteLog::new(vec![2, 3]).unwrap();
        let clean =
            Rows { indices: &[0, 1, 2], experts: &[0, 2, 0, 2, 1, 0], labels: &[0, 1, 1], predictions: &[0, 1, 0] };
        let attacked = Rows {
            indices: &[3, 2, 1, 0],
            experts: &[0, 0, 1, 0, 1, 1, 0, 2],
            labels: &[0, -1, -1, -1],
            predictions: &[0, 0, 1, 1],
        };
        log.append(key("clean"), clean).unwrap();
        log.append(key("pgd"), attacked).unwrap();
        log
    }

    #[test]
    fn load_counts_samples_by_layer_class_and_expert() {
        let mut log = log();
        let clean = log.table(&key("clean")).unwrap();
        assert_eq!(load(clean, 1, 3).unwrap(), [2, 1, 0, 1, 0, 2]);
        // Layer 0: class 0 took expert 0 once; class 1 experts 0 and 1. Layer 1: class 0 expert 2;
        // class 1 experts 2, 0.
        assert_eq!(load(clean, 2, 3).unwrap(), [1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1]);
        let message = load(log.table(&key("pgd")).unwrap(), 2, 3).unwrap_err().to_string();
        assert_eq!(message, "expected labels 0 to 1, got -1 for sample 0");
        let message = load(log.table(&key("pgd")).unwrap(), usize::MAX, 3).unwrap_err().to_string();
        assert_eq!(message, format!("expected 1 to 1048576 classes, got {}", usize::MAX));
    }

    #[test]
    fn counts_that_do_not_fit_in_memory_are_refused() {
        // 2^16 x 2^20 x 256 counts of 8 bytes are 2^47 bytes: all addresses that a process has.
        let mut log = RouteLog::new(vec![256; 1 << 16]).unwrap();
        let rows = Rows { indices: &[0], experts: &[0; 1 << 16], labels: &[0], predictions: &[0] };
        log.append(key("clean"), rows).unwrap();
        let table = log.table(&key("clean")).unwrap();
        let message = load(table, MAX_CLASSES, 256).unwrap_err().to_string();
        let counts = "65536 MoE layers x 1048576 classes x 256 experts";
        assert_eq!(message, format!("expected counts that fit in memory, got {counts}; use fewer classes"));
        assert!(load(table, MAX_CLASSES, usize::MAX).is_err());
    }

    #[test]
    fn unique_pathways_come_with_their_counts() {
        let mut log = log();
        let table = log.table(&key("clean")).unwrap();
        assert_eq!(unique(table), [(&[0, 2][..], 2), (&[1, 0][..], 1)]);
    }

    #[test]
    fn a_comparison_dissects_the_samples_both_have() {
        let mut log = log();
        let (clean, attacked) = log.pair(&key("clean"), &key("pgd")).unwrap();
        // Sample 0 keeps (0, 2) and is wrong: class 3. Sample 1 changes from (0, 2) to (1, 1) and
        // is correct: class 2. Sample 2 keeps (1, 0) and is predicted 0 instead of 1: class 3. Only
        // one condition has sample 3.
        let expected = Comparison {
            matched: 3,
            changed_by_layer: vec![1, 1],
            by_num_changed: vec![2, 0, 1],
            outcomes: [0, 1, 2, 0, 0],
        };
        assert_eq!(compare(clean, attacked), Some(expected));
    }

    #[test]
    fn samples_of_which_none_is_common_have_no_comparison() {
        let mut log = log();
        let rows = Rows { indices: &[4, 5], experts: &[0, 2, 0, 2], labels: &[0, 1], predictions: &[0, 1] };
        log.append(key("apgd"), rows).unwrap();
        let (clean, attacked) = log.pair(&key("clean"), &key("apgd")).unwrap();
        assert_eq!(compare(clean, attacked), None);
        assert_eq!(compare(attacked, clean), None);
    }
}
