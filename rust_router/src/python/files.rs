//! Python bindings of single images and packs.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::{IntoPyArray, PyArray1, PyArray3, PyArrayMethods};
use pyo3::prelude::*;

use super::{ConfigError, DataError};
use crate::images::source::guarded;
use crate::images::{decode, pack};

type Array1<'py, T> = Bound<'py, PyArray1<T>>;

/// Writes a pack. A pack that is not finished leaves no file.
#[pyclass(frozen)]
pub(super) struct PackWriter(Mutex<Option<pack::PackWriter>>);

impl PackWriter {
    fn take(&self) -> PyResult<pack::PackWriter> {
        let writer = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        writer.ok_or_else(|| {
            ConfigError::new_err(
                "expected a writer that is open, got one that is finished or has failed; create a new one",
            )
        })
    }
}

#[pymethods]
impl PackWriter {
    #[new]
    fn new(path: PathBuf) -> PyResult<Self> {
        Ok(Self(Mutex::new(Some(pack::PackWriter::create(&path)?))))
    }

    /// Adds one encoded image.
    fn add(&self, image: &[u8], label: i64) -> PyResult<()> {
        let mut writer = self.take()?;
        writer.add(image, label)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Ok(())
    }

    /// Completes the file. `text` describes the origin of the images.
    fn finish(&self, py: Python<'_>, text: &str) -> PyResult<()> {
        let writer = self.take()?;
        Ok(py.detach(|| writer.finish(text))?)
    }

    /// Deletes the file if it is not finished.
    fn close(&self) {
        drop(self.take());
    }
}

/// Offsets `[n]`, lengths `[n]` and labels `[n]` of the images of a pack, and its text.
type PackContents<'py> = (Array1<'py, u64>, Array1<'py, u64>, Array1<'py, i64>, String);

/// Reads the index of a pack, without its images.
#[pyfunction]
pub(super) fn open_pack(py: Python<'_>, path: PathBuf) -> PyResult<PackContents<'_>> {
    let pack = py.detach(|| pack::Pack::open(&path))?;
    let offsets: Vec<u64> = pack.spans.iter().map(|span| span.offset).collect();
    let lengths: Vec<u64> = pack.spans.iter().map(|span| span.length).collect();
    Ok((offsets.into_pyarray(py), lengths.into_pyarray(py), pack.labels.into_pyarray(py), pack.text))
}

/// Decodes one JPEG or PNG image to `[height, width, 3]`.
#[pyfunction]
pub(super) fn decode_image<'py>(py: Python<'py>, encoded: &[u8]) -> PyResult<Bound<'py, PyArray3<u8>>> {
    let mut rgb = Vec::new();
    let size = py.detach(|| guarded(|| decode::decode(encoded, &mut rgb)));
    let (height, width) = size.map_err(DataError::new_err)?;
    rgb.into_pyarray(py).reshape([height, width, 3])
}
