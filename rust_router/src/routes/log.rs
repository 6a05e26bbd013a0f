//! The route log: the expert of every sample in every MoE layer, by condition. It uses one byte per
//! layer and sample.
//!
//! The key of a row is (condition, epoch, sample index). A new row replaces an old row with the
//! same key. The result therefore does not change if a batch is appended twice, or if the logs of
//! several ranks are merged in another order.

use std::collections::BTreeMap;

use crate::routes::error::{Error, Result};
use crate::routes::key::{Key, MAX_CONDITION};

/// Rows of samples in any order. Labels and predictions are classes, or -1 if unknown.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Sample indices.
    pub indices: &'a [i64],
    /// Expert indices, `[sample, layer]`.
    pub experts: &'a [u8],
    /// True classes.
    pub labels: &'a [i32],
    /// Predicted classes.
    pub predictions: &'a [i32],
}

/// The rows of one condition, sorted by sample index. Each index occurs once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    indices: Vec<i64>,
    experts: Vec<u8>,
    labels: Vec<i32>,
    predictions: Vec<i32>,
    num_layers: usize,
    /// The rows before this position are sorted. Later rows came out of order and are sorted later.
    ordered: usize,
}

impl Table {
    fn new(num_layers: usize) -> Self {
        Self { num_layers, ..Self::default() }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// Number of MoE layers.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// All rows.
    #[must_use]
    pub fn rows(&self) -> Rows<'_> {
        let Self { indices, experts, labels, predictions, .. } = self;
        Rows { indices, experts, labels, predictions }
    }

    /// The pathway of row `row`: one expert index per layer.
    #[must_use]
    pub fn pathway(&self, row: usize) -> &[u8] {
        &self.experts[row * self.num_layers..][..self.num_layers]
    }

    fn push(&mut self, rows: Rows<'_>) {
        /// Rows out of order are sorted when there are more than this. The limit bounds the memory
        /// of repeated rows.
        const PATIENCE: usize = 1 << 16;
        self.indices.extend_from_slice(rows.indices);
        self.experts.extend_from_slice(rows.experts);
        self.labels.extend_from_slice(rows.labels);
        self.predictions.extend_from_slice(rows.predictions);
        while self.ordered < self.len()
            && (self.ordered == 0 || self.indices[self.ordered - 1] < self.indices[self.ordered])
        {
            self.ordered += 1;
        }
        if self.len() - self.ordered > self.ordered.max(PATIENCE) {
            self.sort();
        }
    }

    /// Sorts all rows and drops replaced rows.
    fn sort(&mut self) {
        if self.ordered == self.len() {
            return;
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by_key(|&row| self.indices[row]); // stable: the newest of equal indices is last
        let newest = order.iter().zip(order.iter().skip(1).map(Some).chain([None]));
        let kept: Vec<usize> = newest
            .filter(|(row, next)| next.is_none_or(|next| self.indices[*next] != self.indices[**row]))
            .map(|(&row, _)| row)
            .collect();
        self.experts = kept.iter().flat_map(|&row| self.pathway(row)).copied().collect();
        self.indices = kept.iter().map(|&row| self.indices[row]).collect();
        self.labels = kept.iter().map(|&row| self.labels[row]).collect();
        self.predictions = kept.iter().map(|&row| self.predictions[row]).collect();
        self.ordered = self.len();
    }
}

/// Route tables by condition and epoch, of a model with a given number of experts in each MoE
/// layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteLog {
    num_experts: Vec<u16>,
    tables: BTreeMap<Key, Table>,
}

impl RouteLog {
    /// An empty log for a model whose MoE layers have `num_experts` experts (1 to 256 each).
    ///
    /// # Errors
    /// A layer has no expert or more than 256.
    pub fn new(num_experts: Vec<u16>) -> Result<Self> {
        if let Some((layer, n)) = num_experts.iter().enumerate().find(|(_, n)| !(1..=256).contains(*n)) {
            return Err(Error::NumExperts { layer, num_experts: usize::from(*n) });
        }
        Ok(Self { num_experts, tables: BTreeMap::new() })
    }

    /// Number of experts of each MoE layer.
    #[must_use]
    pub fn num_experts(&self) -> &[u16] {
        &self.num_experts
    }

    /// Conditions and epochs with rows, in order.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.tables.keys()
    }

    /// Adds rows to a condition. They replace older rows of the same samples. Without rows, the log
    /// does not change.
    ///
    /// # Errors
    /// The columns have different lengths, an expert index is too large, a sample index is
    /// negative, a class is below -1, or the name of the condition is not allowed. In these cases
    /// no row is added.
    pub fn append(&mut self, key: Key, rows: Rows<'_>) -> Result<()> {
        let num_layers = self.num_experts.len();
        let expected = rows.indices.len();
        if key.condition.is_empty() || key.condition.contains('\0') || key.condition.chars().count() > MAX_CONDITION {
            return Err(Error::ConditionName { name: key.condition });
        }
        for (column, len) in [("labels", rows.labels.len()), ("predictions", rows.predictions.len())] {
            if len != expected {
                return Err(Error::ColumnLength { column, expected, len });
            }
        }
        if rows.experts.len() != expected * num_layers {
            return Err(Error::ExpertTable { num_samples: expected, num_layers, len: rows.experts.len() });
        }
        if let Some(&index) = rows.indices.iter().find(|&&index| index < 0) {
            return Err(Error::SampleIndex { index });
        }
        if let Some(&class) = rows.labels.iter().chain(rows.predictions).find(|&&class| class < -1) {
            return Err(Error::Class { class });
        }
        for pathway in rows.experts.chunks_exact(num_layers.max(1)) {
            for (layer, (&expert, &n)) in pathway.iter().zip(&self.num_experts).enumerate() {
                if u16::from(expert) >= n {
                    return Err(Error::Expert { layer, last: n - 1, expert });
                }
            }
        }
        if expected > 0 {
            self.tables.entry(key).or_insert_with(|| Table::new(num_layers)).push(rows);
        }
        Ok(())
    }

    /// Adds all rows of another log of the same model. They replace rows with the same key.
    ///
    /// # Errors
    /// The other log has other numbers of experts.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.num_experts != other.num_experts {
            return Err(Error::OtherModel { ours: self.num_experts.clone(), theirs: other.num_experts.clone() });
        }
        for (key, table) in &other.tables {
            let num_layers = self.num_experts.len();
            self.tables.entry(key.clone()).or_insert_with(|| Table::new(num_layers)).push(table.rows());
        }
        Ok(())
    }

    /// Drops all rows of epochs before `epoch`.
    pub fn forget_before(&mut self, epoch: u32) {
        self.tables.retain(|key, _| key.epoch >= epoch);
    }

    /// Sorts rows that were appended out of order. Tables can be read afterwards.
    pub fn sort(&mut self) {
        self.tables.values_mut().for_each(Table::sort);
    }

    /// All tables in order of their keys.
    pub fn tables(&mut self) -> impl ExactSizeIterator<Item = (&Key, &Table)> {
        self.sort();
        self.tables.iter()
    }

    /// The tables of two conditions, which may be equal.
    ///
    /// # Errors
    /// A condition has no rows.
    pub fn pair(&mut self, a: &Key, b: &Key) -> Result<(&Table, &Table)> {
        self.sort();
        let find = |key: &Key| {
            let known = || self.tables.keys().cloned().collect();
            self.tables.get(key).ok_or_else(|| Error::NoSuchCondition { key: key.clone(), known: known() })
        };
        Ok((find(a)?, find(b)?))
    }

    /// The table of one condition.
    ///
    /// # Errors
    /// The condition has no rows.
    pub fn table(&mut self, key: &Key) -> Result<&Table> {
        self.pair(key, key).map(|(table, _)| table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(condition: &str) -> Key {
        Key { condition: condition.into(), epoch: 0 }
    }

    /// Appends rows of a two-layer model. Their content is a function of the index, as with a
    /// deterministic model.
    fn append(log: &mut RouteLog, condition: &str, indices: &[i64]) {
        let experts: Vec<u8> = indices.iter().flat_map(|i| [(i % 2) as u8, (i / 2 % 3) as u8]).collect();
        let labels: Vec<i32> = indices.iter().map(|i| (i % 10) as i32).collect();
        let predictions = vec![-1; indices.len()];
        let rows = Rows { indices, experts: &experts, labels: &labels, predictions: &predictions };
        log.append(key(condition), rows).unwrap();
    }

    proptest! {
        #[test]
        fn the_order_and_repetition_of_batches_do_not_matter(
            batches in proptest::collection::vec(proptest::collection::vec(0..50_i64, 0..8), 0..8),
        ) {
            let mut forwards = RouteLog::new(vec![2, 3]).unwrap();
            let mut backwards = forwards.clone();
            append(&mut forwards, "clean", &[0]);
            append(&mut backwards, "clean", &[0]);
            batches.iter().for_each(|batch| append(&mut forwards, "clean", batch));
            batches.iter().rev().for_each(|batch| append(&mut backwards, "clean", batch));
            let copy = backwards.clone();
            backwards.merge(&copy).unwrap();
            forwards.sort();
            backwards.sort();
            prop_assert_eq!(&forwards, &backwards);
            let indices = forwards.table(&key("clean")).unwrap().rows().indices;
            prop_assert!(indices.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn a_row_that_comes_again_replaces_the_old_one() {
        let mut log = RouteLog::new(vec![2]).unwrap();
        for experts in [[0, 0], [1, 0]] {
            let rows = Rows { indices: &[4, 2], experts: &experts, labels: &[0, 0], predictions: &[1, 1] };
            log.append(key("clean"), rows).unwrap();
        }
        let rows = log.table(&key("clean")).unwrap().rows();
        assert_eq!((rows.indices, rows.experts), (&[2, 4][..], &[0, 1][..]));
    }

    #[test]
    fn repeated_rows_do_not_pile_up() {
        let mut log = RouteLog::new(vec![2]).unwrap();
        let indices: Vec<i64> = (0..1000).rev().collect();
        let (experts, classes) = (vec![1; 1000], vec![0; 1000]);
        for _ in 0..500 {
            let rows = Rows { indices: &indices, experts: &experts, labels: &classes, predictions: &classes };
            log.append(key("clean"), rows).unwrap();
        }
        assert!(log.tables[&key("clean")].len() <= 1000 + (1 << 16));
    }

    #[test]
    fn epochs_are_forgotten_from_the_first() {
        let mut log = RouteLog::new(vec![2]).unwrap();
        let rows = Rows { indices: &[0], experts: &[1], labels: &[0], predictions: &[0] };
        for (condition, epoch) in [("clean", 1), ("clean", 2), ("pgd", 1), ("pgd", 3)] {
            log.append(Key { condition: condition.into(), epoch }, rows).unwrap();
        }
        log.forget_before(2);
        let kept: Vec<_> = log.keys().map(|key| (key.condition.as_str(), key.epoch)).collect();
        assert_eq!(kept, [("clean", 2), ("pgd", 3)]);
    }

    #[test]
    fn rows_that_do_not_fit_are_refused_whole() {
        let mut log = RouteLog::new(vec![2, 3]).unwrap();
        let fits = Rows { indices: &[0], experts: &[1, 2], labels: &[0], predictions: &[-1] };
        let bad = [
            (Rows { experts: &[1, 3], ..fits }, "expected experts 0 to 2 in MoE layer 1, got 3"),
            (Rows { experts: &[1], ..fits }, "expected 1 x 2 expert indices (samples x MoE layers), got 1"),
            (Rows { indices: &[-1], ..fits }, "expected sample indices from 0, got -1"),
            (Rows { labels: &[], ..fits }, "expected 1 labels, one for each sample, got 0"),
            (Rows { predictions: &[-2], ..fits }, "expected classes from 0, or -1 for unknown, got -2"),
        ];
        for (rows, message) in bad {
            assert_eq!(log.append(key("clean"), rows).unwrap_err().to_string(), message);
        }
        let message = "the route log has no \"clean\" of epoch 0; it has nothing";
        assert_eq!(log.table(&key("clean")).unwrap_err().to_string(), message);
    }

    #[test]
    fn no_rows_are_no_condition() {
        let mut log = RouteLog::new(vec![2]).unwrap();
        let none = Rows { indices: &[], experts: &[], labels: &[], predictions: &[] };
        log.append(key("clean"), none).unwrap();
        assert_eq!(log.keys().count(), 0);
        assert!(log.append(key(""), none).is_err()); // the name is checked all the same
    }

    #[test]
    fn a_model_without_routing_has_rows_without_experts() {
        let mut log = RouteLog::new(vec![]).unwrap();
        let rows = Rows { indices: &[3, 1], experts: &[], labels: &[0, 1], predictions: &[0, 0] };
        log.append(key("clean"), rows).unwrap();
        assert_eq!(log.table(&key("clean")).unwrap().len(), 2);
    }
}
