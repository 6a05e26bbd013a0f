//! The Python module `advmoe.rust_router`. It only converts arguments and results, and releases the
//! interpreter lock.

mod batches;
mod files;
mod routes;

use numpy::ndarray::Dimension;
use numpy::{Element, PyReadonlyArray, PyReadwriteArray, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::error::FileError;
use crate::images::Error as ImageError;
use crate::routes::Error as RouteError;

pyo3::import_exception!(advmoe.errors, ConfigError);
pyo3::import_exception!(advmoe.errors, DataError);

impl From<FileError> for PyErr {
    fn from(error: FileError) -> Self {
        DataError::new_err(error.to_string())
    }
}

impl From<ImageError> for PyErr {
    fn from(error: ImageError) -> Self {
        use ImageError as Error;
        let message = error.to_string();
        match error {
            Error::Row { .. } | Error::Sample { .. } | Error::Empty { .. } | Error::Stopped | Error::File(_) => {
                DataError::new_err(message)
            }
            Error::NumThreads { .. }
            | Error::Threads { .. }
            | Error::Buffer { .. }
            | Error::Pixels { .. }
            | Error::Span { .. }
            | Error::ImageSize { .. }
            | Error::ResizeTooSmall { .. }
            | Error::Resize { .. } => ConfigError::new_err(message),
        }
    }
}

impl From<RouteError> for PyErr {
    fn from(error: RouteError) -> Self {
        match error {
            RouteError::File(error) => error.into(),
            other => ConfigError::new_err(other.to_string()),
        }
    }
}

/// The elements of an array, the last axis first.
///
/// `as_slice` alone also accepts an array in Fortran order, whose elements lie in another order.
fn c_slice<'a, T: Element, D: Dimension>(array: &'a PyReadonlyArray<'_, T, D>) -> PyResult<&'a [T]> {
    if !array.is_c_contiguous() {
        return Err(not_contiguous());
    }
    array.as_slice().map_err(|_| not_contiguous())
}

/// As [`c_slice`], for an array that is written.
fn c_slice_mut<'a, T: Element, D: Dimension>(array: &'a mut PyReadwriteArray<'_, T, D>) -> PyResult<&'a mut [T]> {
    if !array.is_c_contiguous() {
        return Err(not_contiguous());
    }
    array.as_slice_mut().map_err(|_| not_contiguous())
}

fn not_contiguous() -> PyErr {
    ConfigError::new_err("expected C-contiguous arrays; use numpy.ascontiguousarray")
}

#[pymodule]
mod rust_router {
    #[pymodule_export]
    use super::batches::{BatchFiller, EncodedSource, Stop, Transform, epoch_order};
    #[pymodule_export]
    use super::files::{PackWriter, decode_image, open_pack};
    #[pymodule_export]
    use super::routes::{Channels, RouteLog};
}
