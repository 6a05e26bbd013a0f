//! Python bindings of batches.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray4, PyReadwriteArray4, PyUntypedArrayMethods, ToPyArray};
use pyo3::prelude::*;

use super::{ConfigError, c_slice, c_slice_mut};
use crate::images::Result;
use crate::images::augment;
use crate::images::batch::{self, Layout};
use crate::images::loader::{self, Recipe, Request, Skipped, Workers};
use crate::images::source::{self, Pixels, Source, Span};
use crate::rng::Stream;

/// The order of an epoch: a permutation of `range(len)`. It is a pure function of its arguments.
#[pyfunction]
pub(super) fn epoch_order(
    py: Python<'_>,
    seed: u64,
    stream: u64,
    epoch: u64,
    len: usize,
) -> PyResult<Bound<'_, PyArray1<i64>>> {
    let order = py.detach(|| Stream { seed, stream }.permutation(epoch, len)).map_err(|reason| {
        ConfigError::new_err(format!("expected a number of images whose order fits in memory, got {len} ({reason})"))
    })?;
    Ok(order.to_pyarray(py))
}

/// The transform of every image.
#[pyclass(frozen, from_py_object)]
#[derive(Clone)]
pub(super) struct Transform(augment::Transform);

#[pymethods]
impl Transform {
    /// No change.
    #[staticmethod]
    fn as_they_are() -> Self {
        Self(augment::Transform::AsTheyAre)
    }

    /// Zero padding, a random crop of the original size, and a random flip.
    #[staticmethod]
    fn crop_flip(padding: u32, flip: bool) -> Self {
        Self(augment::Transform::CropFlip { padding, flip })
    }

    /// A random rectangle, resized to the size of the batch, and a random flip.
    #[staticmethod]
    fn random_resized_crop(scale: (f64, f64), ratio: (f64, f64), flip: bool) -> Self {
        Self(augment::Transform::RandomResizedCrop { scale, ratio, flip })
    }

    /// Resizing by the shorter side, then a center crop.
    #[staticmethod]
    fn resize_center_crop(resize: usize) -> Self {
        Self(augment::Transform::ResizeCenterCrop { resize })
    }
}

/// Encoded images in files.
#[pyclass(frozen)]
pub(super) struct EncodedSource(source::Encoded);

#[pymethods]
impl EncodedSource {
    /// Image i consists of `lengths[i]` bytes of `files[file_indices[i]]`, starting at
    /// `offsets[i]`. A length of 0 means all bytes up to the end of the file.
    #[new]
    fn new(
        files: Vec<PathBuf>,
        file_indices: PyReadonlyArray1<'_, u32>,
        offsets: PyReadonlyArray1<'_, u64>,
        lengths: PyReadonlyArray1<'_, u64>,
    ) -> PyResult<Self> {
        let (file_indices, offsets, lengths) = (file_indices.as_array(), offsets.as_array(), lengths.as_array());
        if file_indices.len() != offsets.len() || offsets.len() != lengths.len() {
            return Err(ConfigError::new_err("expected as many file indices as offsets and lengths"));
        }
        let spans = file_indices.iter().zip(offsets).zip(lengths);
        let spans = spans.map(|((&file, &offset), &length)| Span { file, offset, length });
        Ok(Self(source::Encoded::new(files, spans.collect())?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Height and width of an image, read from its header.
    fn size(&self, py: Python<'_>, row: usize) -> PyResult<(usize, usize)> {
        Ok(py.detach(|| self.0.size(row))?)
    }
}

/// A flag that stops the work of other threads within the time of one image.
#[pyclass(frozen)]
#[derive(Default)]
pub(super) struct Stop(AtomicBool);

#[pymethods]
impl Stop {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Stops the work that holds this flag.
    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The condition that stops a batch: a flag or, if the thread of the interpreter fills the batch, a
/// signal to the process.
struct Interruption<'a> {
    stop: &'a Stop,
    asks_python: bool,
    began: Instant,
    /// Time of the last check for signals in Python, in milliseconds.
    asked: AtomicU64,
    signal: OnceLock<PyErr>,
}

impl<'a> Interruption<'a> {
    /// Longest wait of a signal, in addition to the time of one image, in milliseconds.
    const PATIENCE: u64 = 20;

    fn new(stop: &'a Stop, asks_python: bool) -> Self {
        Self { stop, asks_python, began: Instant::now(), asked: AtomicU64::new(0), signal: OnceLock::new() }
    }

    fn came(&self) -> bool {
        if self.stop.0.load(Ordering::Relaxed) {
            return true;
        }
        if !self.asks_python {
            return false;
        }
        let now = self.began.elapsed().as_millis() as u64;
        if now < self.asked.load(Ordering::Relaxed) + Self::PATIENCE {
            return false;
        }
        self.asked.store(now, Ordering::Relaxed);
        Python::attach(|py| py.check_signals()).is_err_and(|signal| self.signal.set(signal).is_ok())
    }
}

/// Images in a NumPy array or in files.
#[derive(FromPyObject)]
enum Images<'py> {
    Pixels(PyReadonlyArray4<'py, u8>),
    Encoded(Bound<'py, EncodedSource>),
}

/// Fills batches with the interpreter lock released. It belongs to the process that created it.
#[pyclass(frozen)]
pub(super) struct BatchFiller {
    workers: Workers,
    bytes: Recipe<u8>,
    floats: Recipe<f32>,
}

impl BatchFiller {
    fn fill_from<'py>(
        &self,
        py: Python<'py>,
        source: &(dyn Source + Sync),
        request: Request<'_>,
        out: &Bound<'py, PyAny>,
    ) -> PyResult<Vec<Skipped>> {
        let done: Result<Vec<Skipped>> = if let Ok(mut out) = out.extract::<PyReadwriteArray4<'py, f32>>() {
            let out = c_slice_mut(&mut out)?;
            py.detach(|| loader::fill(&self.workers, source, &self.floats, request, out))
        } else {
            let mut out = out.extract::<PyReadwriteArray4<'py, u8>>()?;
            let out = c_slice_mut(&mut out)?;
            py.detach(|| loader::fill(&self.workers, source, &self.bytes, request, out))
        };
        Ok(done?)
    }
}

#[pymethods]
impl BatchFiller {
    #[new]
    #[pyo3(signature = (*, seed, stream, transform, mean, std, channels_last, num_threads, skip_bad))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        seed: u64,
        stream: u64,
        transform: Transform,
        mean: [f32; 3],
        std: [f32; 3],
        channels_last: bool,
        num_threads: usize,
        skip_bad: bool,
    ) -> PyResult<Self> {
        let (stream, transform) = (Stream { seed, stream }, transform.0);
        let layout = if channels_last { Layout::Interleaved } else { Layout::Planar };
        Ok(Self {
            workers: Workers::new(num_threads)?,
            bytes: Recipe { stream, transform, levels: batch::byte_levels(), layout, skip_bad },
            floats: Recipe { stream, transform, levels: batch::float_levels(mean, std), layout, skip_bad },
        })
    }

    /// Writes the images of `rows` in `epoch` into `out`: a C-contiguous array of uint8 or float32,
    /// `[B, 3, H, W]` or, with `channels_last`, `[B, H, W, 3]`. Returns position and error of each
    /// skipped image.
    fn fill<'py>(
        &self,
        py: Python<'py>,
        images: Images<'py>,
        rows: PyReadonlyArray1<'py, i64>,
        epoch: u64,
        out: &Bound<'py, PyAny>,
        stop: &Stop,
    ) -> PyResult<Vec<(usize, String)>> {
        let rows = c_slice(&rows)?;
        let shape: [usize; 4] = out.getattr("shape")?.extract::<(usize, usize, usize, usize)>()?.into();
        let ([height, width], expected, form) = match self.bytes.layout {
            Layout::Planar => ([shape[2], shape[3]], [rows.len(), 3, shape[2], shape[3]], "3, H, W"),
            Layout::Interleaved => ([shape[1], shape[2]], [rows.len(), shape[1], shape[2], 3], "H, W, 3"),
        };
        if shape != expected {
            let message = format!("expected a batch [{}, {form}] to fill, got {shape:?}", rows.len());
            return Err(ConfigError::new_err(message));
        }
        let interruption = Interruption::new(stop, self.workers.are_only_the_caller());
        let came = || interruption.came();
        let request = Request { rows, epoch, height, width, stop: &came };
        let filled = match &images {
            Images::Pixels(array) => {
                let &[_, height, width, 3] = array.shape() else {
                    let shape = array.shape();
                    return Err(ConfigError::new_err(format!("expected RGB images [n, H, W, 3], got {shape:?}")));
                };
                let source = Pixels::new(c_slice(array)?, height, width)?;
                self.fill_from(py, &source, request, out)
            }
            Images::Encoded(source) => self.fill_from(py, &source.get().0, request, out),
        };
        let skipped = match interruption.signal.into_inner() {
            Some(signal) => return Err(signal),
            None => filled?,
        };
        Ok(skipped.into_iter().map(|skipped| (skipped.position, skipped.error.to_string())).collect())
    }
}
