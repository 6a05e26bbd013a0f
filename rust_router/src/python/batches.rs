//! Batches, for Python.

use std::sync::atomic::{AtomicBool, Ordering};

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray4, PyReadwriteArray4, PyUntypedArrayMethods, ToPyArray};
use pyo3::prelude::*;

use super::{ConfigError, contiguous};
use crate::augment::{self, Layout};
use crate::loader::{self, Recipe, Request, Workers};
use crate::rng::Stream;
use crate::source::Pixels;

/// The order of an epoch: a permutation of `range(len)`, a pure function of its arguments.
#[pyfunction]
pub(super) fn epoch_order(py: Python<'_>, seed: u64, stream: u64, epoch: u64, len: usize) -> Bound<'_, PyArray1<i64>> {
    py.detach(|| Stream { seed, stream }.permutation(epoch, len)).to_pyarray(py)
}

/// Random crop of the image's own size after zero padding, then a random mirror.
#[pyclass(frozen, from_py_object)]
#[derive(Clone)]
pub(super) struct CropFlip(augment::CropFlip);

#[pymethods]
impl CropFlip {
    #[new]
    fn new(padding: u32, flip: bool) -> Self {
        Self(augment::CropFlip { padding, flip })
    }
}

/// A flag that ends the work of other threads within one image's time.
#[pyclass(frozen)]
#[derive(Default)]
pub(super) struct Stop(AtomicBool);

#[pymethods]
impl Stop {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Asks the work that holds this flag to end.
    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Fills batches with the interpreter released. Belongs to the process that made it.
#[pyclass(frozen)]
pub(super) struct BatchFiller {
    workers: Workers,
    bytes: Recipe<u8>,
    floats: Recipe<f32>,
}

#[pymethods]
impl BatchFiller {
    #[new]
    #[pyo3(signature = (*, seed, stream, augment, mean, std, channels_last, num_threads))]
    fn new(
        seed: u64,
        stream: u64,
        augment: Option<CropFlip>,
        mean: [f32; 3],
        std: [f32; 3],
        channels_last: bool,
        num_threads: usize,
    ) -> PyResult<Self> {
        let stream = Stream { seed, stream };
        let augment = augment.map(|a| a.0);
        let layout = if channels_last { Layout::Interleaved } else { Layout::Planar };
        Ok(Self {
            workers: Workers::new(num_threads)?,
            bytes: Recipe { stream, augment, levels: augment::byte_levels(), layout },
            floats: Recipe { stream, augment, levels: augment::float_levels(mean, std), layout },
        })
    }

    /// Writes the images of `rows`, as `epoch` sees them, into `out`: uint8 or float32, `[B, 3, H, W]` or, with
    /// `channels_last`, `[B, H, W, 3]`, C-contiguous.
    fn fill<'py>(
        &self,
        py: Python<'py>,
        images: PyReadonlyArray4<'py, u8>,
        rows: PyReadonlyArray1<'py, i64>,
        epoch: u64,
        out: &Bound<'py, PyAny>,
        stop: &Stop,
    ) -> PyResult<()> {
        let &[_, height, width, channels] = images.shape() else { unreachable!("four axes by type") };
        if channels != 3 {
            return Err(ConfigError::new_err(format!("expected RGB images [n, H, W, 3], got {channels} channels")));
        }
        let source = Pixels::new(images.as_slice().map_err(contiguous)?, height, width)?;
        let rows = rows.as_slice().map_err(contiguous)?;
        let request = Request { rows, epoch, height, width, stop: &stop.0 };
        if let Ok(mut out) = out.extract::<PyReadwriteArray4<'py, f32>>() {
            let out = out.as_slice_mut().map_err(contiguous)?;
            py.detach(|| loader::fill(&self.workers, &source, &self.floats, request, out))?;
        } else {
            let mut out = out.extract::<PyReadwriteArray4<'py, u8>>()?;
            let out = out.as_slice_mut().map_err(contiguous)?;
            py.detach(|| loader::fill(&self.workers, &source, &self.bytes, request, out))?;
        }
        Ok(())
    }
}
