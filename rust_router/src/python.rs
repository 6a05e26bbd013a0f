//! The Python module `advmoe.rust_router`: converts and releases the interpreter, nothing else.

mod batches;
mod files;
mod routes;

use pyo3::prelude::*;

use crate::error::Error;

pyo3::import_exception!(advmoe.errors, ConfigError);
pyo3::import_exception!(advmoe.errors, DataError);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Argument(_) | Error::Threads { .. } => ConfigError::new_err(message),
            Error::Row { .. } | Error::Sample { .. } | Error::Stopped | Error::Io { .. } | Error::Format { .. } => {
                DataError::new_err(message)
            }
        }
    }
}

/// An array that cannot be seen as a slice.
fn contiguous(_: impl std::error::Error) -> PyErr {
    ConfigError::new_err("expected C-contiguous arrays; use numpy.ascontiguousarray")
}

#[pymodule]
mod rust_router {
    #[pymodule_export]
    use super::batches::{BatchFiller, EncodedSource, Stop, Transform, epoch_order};
    #[pymodule_export]
    use super::files::{PackWriter, decode_image, open_pack, tar_samples};
    #[pymodule_export]
    use super::routes::{Channels, RouteLog};
}
