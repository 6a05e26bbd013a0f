//! Errors of files. The modules `images` and `routes` add their own errors.

use std::path::{Path, PathBuf};

/// A file cannot be read, written or understood.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system could not read or write the file.
    #[error("cannot {verb} {}: {reason}", path.display())]
    Io {
        /// The attempted operation: "read" or "write".
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        reason: std::io::Error,
    },
    /// The content has another format, or is damaged.
    #[error("{} is not a {what} or is damaged: {reason}", path.display())]
    Format {
        /// The expected kind of file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The first difference from the expected format.
        reason: String,
    },
}

impl FileError {
    /// Makes a [`FileError::Io`].
    #[must_use]
    pub fn io(verb: &'static str, path: &Path, reason: std::io::Error) -> Self {
        Self::Io { verb, path: path.to_owned(), reason }
    }
}
