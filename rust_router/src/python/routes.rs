//! Python bindings of the route log.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::{IntoPyArray, PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use numpy::{PyUntypedArrayMethods, ToPyArray};
use pyo3::prelude::*;

use super::{ConfigError, c_slice};
use crate::routes::Result;
use crate::routes::diversity::{self, PairBudget};
use crate::routes::key::Key;
use crate::routes::log::Rows;
use crate::routes::{channels, file, log, pathways, similarity};

type Array1<'py, T> = Bound<'py, PyArray1<T>>;
type Array2<'py, T> = Bound<'py, PyArray2<T>>;

/// Name and epoch of a condition.
type PyKey = (String, u32);

fn key((condition, epoch): PyKey) -> Key {
    Key { condition, epoch }
}

/// The channels that each expert of each MoE layer computes.
#[pyclass(frozen)]
pub(super) struct Channels(channels::Channels);

#[pymethods]
impl Channels {
    /// Takes one bool table `[expert, channel]` per layer.
    #[new]
    fn new(layers: Vec<PyReadonlyArray2<'_, bool>>) -> PyResult<Self> {
        let mut channels = channels::Channels::new();
        for layer in layers {
            channels.push(c_slice(&layer)?.to_vec(), layer.shape()[1])?;
        }
        Ok(Self(channels))
    }

    /// Number of channels of all layers together.
    #[getter]
    fn num_channels(&self) -> usize {
        self.0.num_channels()
    }
}

/// The expert of every sample in every MoE layer, by condition. Threads may share a log.
#[pyclass(frozen)]
pub(super) struct RouteLog(Mutex<log::RouteLog>);

impl RouteLog {
    /// Calls a function with the log while the interpreter lock is released.
    fn with<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut log::RouteLog) -> Result<T> + Send) -> Result<T> {
        // A panic cannot leave incomplete columns, because `append` checks all rows before it adds
        // them.
        py.detach(|| work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[pymethods]
impl RouteLog {
    #[new]
    fn new(num_experts: Vec<u16>) -> PyResult<Self> {
        Ok(Self(Mutex::new(log::RouteLog::new(num_experts)?)))
    }

    /// Reads a log from a file.
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self(Mutex::new(py.detach(|| file::load(&path))?)))
    }

    /// Writes the log to a file. The file appears complete or not at all.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(self.with(py, |log| file::save(log, &path))?)
    }

    /// Number of experts of each MoE layer.
    #[getter]
    fn num_experts(&self, py: Python<'_>) -> PyResult<Vec<u16>> {
        Ok(self.with(py, |log| Ok(log.num_experts().to_vec()))?)
    }

    /// Conditions and epochs with rows, in order.
    fn keys(&self, py: Python<'_>) -> PyResult<Vec<PyKey>> {
        Ok(self.with(py, |log| Ok(log.keys().map(|key| (key.condition.clone(), key.epoch)).collect()))?)
    }

    /// Adds rows `[B]` with experts `[B, L]`. Unknown labels and predictions are -1.
    fn append(
        &self,
        py: Python<'_>,
        condition: PyKey,
        indices: PyReadonlyArray1<'_, i64>,
        experts: PyReadonlyArray2<'_, u8>,
        labels: PyReadonlyArray1<'_, i32>,
        predictions: PyReadonlyArray1<'_, i32>,
    ) -> PyResult<()> {
        let num_layers = self.with(py, |log| Ok(log.num_experts().len()))?;
        let (shape, num_samples) = (experts.shape(), indices.len());
        if shape != [num_samples, num_layers] {
            let expected = format!("{num_samples} x {num_layers} expert indices (samples x MoE layers)");
            return Err(ConfigError::new_err(format!("expected {expected}, got {} x {}", shape[0], shape[1])));
        }
        let rows = Rows {
            indices: c_slice(&indices)?,
            experts: c_slice(&experts)?,
            labels: c_slice(&labels)?,
            predictions: c_slice(&predictions)?,
        };
        Ok(self.with(py, |log| log.append(key(condition), rows))?)
    }

    /// Adds all rows of another log. They replace rows with the same key.
    fn merge(&self, py: Python<'_>, other: &Self) -> PyResult<()> {
        // The copy avoids a deadlock if two threads merge two logs into each other.
        let other = other.with(py, |log| Ok(log.clone()))?;
        Ok(self.with(py, |log| log.merge(&other))?)
    }

    /// Drops all rows of epochs before this one.
    fn forget_before(&self, py: Python<'_>, epoch: u32) -> PyResult<()> {
        Ok(self.with(py, |log| {
            log.forget_before(epoch);
            Ok(())
        })?)
    }

    /// Indices `[n]`, experts `[n, L]`, labels `[n]` and predictions `[n]` of a condition, sorted
    /// by index.
    #[expect(clippy::type_complexity, reason = "four columns")]
    fn rows<'py>(
        &self,
        py: Python<'py>,
        condition: PyKey,
    ) -> PyResult<(Array1<'py, i64>, Array2<'py, u8>, Array1<'py, i32>, Array1<'py, i32>)> {
        let table = self.with(py, |log| log.table(&key(condition)).cloned())?;
        let (rows, shape) = (table.rows(), [table.len(), table.num_layers()]);
        let experts = rows.experts.to_pyarray(py).reshape(shape)?;
        Ok((rows.indices.to_pyarray(py), experts, rows.labels.to_pyarray(py), rows.predictions.to_pyarray(py)))
    }

    /// Number of samples `[layer, class, expert]`. With one class, labels are ignored.
    fn expert_load<'py>(
        &self,
        py: Python<'py>,
        condition: PyKey,
        num_classes: usize,
    ) -> PyResult<Bound<'py, PyArray3<u64>>> {
        let (counts, shape) = self.with(py, |log| {
            let max_experts = log.num_experts().iter().copied().max().unwrap_or(0).into();
            let table = log.table(&key(condition))?;
            let shape = [table.num_layers(), num_classes, max_experts];
            Ok((pathways::load(table, num_classes, max_experts)?, shape))
        })?;
        counts.into_pyarray(py).reshape(shape)
    }

    /// Distinct pathways `[U, L]` and their numbers of samples `[U]`, in descending order.
    fn unique<'py>(&self, py: Python<'py>, condition: PyKey) -> PyResult<(Array2<'py, u8>, Array1<'py, u64>)> {
        let (experts, counts, num_layers) = self.with(py, |log| {
            let table = log.table(&key(condition))?;
            let unique = pathways::unique(table);
            let counts: Vec<u64> = unique.iter().map(|(_, count)| *count).collect();
            let experts: Vec<u8> = unique.iter().flat_map(|(pathway, _)| *pathway).copied().collect();
            Ok((experts, counts, table.num_layers()))
        })?;
        let shape = [counts.len(), num_layers];
        Ok((experts.into_pyarray(py).reshape(shape)?, counts.into_pyarray(py)))
    }

    /// Number of samples that both conditions have; changed samples by layer `[L]`; samples by
    /// number of changed layers `[L + 1]`; and samples by outcome: router survived and prediction
    /// correct, fooled and correct, survived and wrong, fooled and wrong, unknown. None if the
    /// conditions have no sample in common.
    #[expect(clippy::type_complexity, reason = "four numbers with names in the lines above")]
    fn compare(
        &self,
        py: Python<'_>,
        before: PyKey,
        after: PyKey,
    ) -> PyResult<Option<(u64, Vec<u64>, Vec<u64>, [u64; 5])>> {
        let found = self.with(py, |log| {
            let (before, after) = log.pair(&key(before), &key(after))?;
            Ok(pathways::compare(before, after))
        })?;
        Ok(found.map(|found| (found.matched, found.changed_by_layer, found.by_num_changed, found.outcomes)))
    }

    /// IoU `[n]` and cosine `[n]` of each sample's pathway with a mask over the channels of all
    /// layers.
    fn mask_similarity<'py>(
        &self,
        py: Python<'py>,
        condition: PyKey,
        channels: &Channels,
        mask: PyReadonlyArray1<'py, bool>,
    ) -> PyResult<(Array1<'py, f64>, Array1<'py, f64>)> {
        let mask = c_slice(&mask)?;
        let (ious, cosines) =
            self.with(py, |log| similarity::with_mask(log.table(&key(condition))?, &channels.0, mask))?;
        Ok((ious.into_pyarray(py), cosines.into_pyarray(py)))
    }

    /// Indices of the samples that both conditions have, and the IoU of their two pathways.
    fn overlap<'py>(
        &self,
        py: Python<'py>,
        before: PyKey,
        after: PyKey,
        channels: &Channels,
    ) -> PyResult<(Array1<'py, i64>, Array1<'py, f64>)> {
        let (indices, ious) = self.with(py, |log| {
            let (before, after) = log.pair(&key(before), &key(after))?;
            similarity::between(before, after, &channels.0)
        })?;
        Ok((indices.into_pyarray(py), ious.into_pyarray(py)))
    }

    /// Pairs of samples by IoU `[num_bins]`, their number, whether these are all pairs, the mean
    /// IoU and the mean intersection.
    #[pyo3(signature = (condition, channels, *, num_bins, max_exact, sampled, seed))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn diversity<'py>(
        &self,
        py: Python<'py>,
        condition: PyKey,
        channels: &Channels,
        num_bins: usize,
        max_exact: u64,
        sampled: u64,
        seed: u64,
    ) -> PyResult<(Array1<'py, u64>, u64, bool, f64, f64)> {
        let budget = PairBudget { max_exact, sampled, seed };
        let found =
            self.with(py, |log| diversity::diversity(log.table(&key(condition))?, &channels.0, num_bins, budget))?;
        let histogram = found.histogram.into_pyarray(py);
        Ok((histogram, found.pairs, found.exact, found.mean_iou, found.mean_intersection))
    }
}
