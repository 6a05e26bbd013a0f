//! Files that cannot be read or written. Both halves of the crate have further errors of their own.

use std::path::{Path, PathBuf};

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused to read or write it.
    #[error("cannot {verb} {}: {reason}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// Its content is not what it should be.
    #[error("{} is not a {what} or is damaged: {reason}", path.display())]
    Format {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it is not.
        reason: String,
    },
}

impl FileError {
    /// A [`FileError::Io`].
    #[must_use]
    pub fn io(verb: &'static str, path: &Path, reason: std::io::Error) -> Self {
        Self::Io { verb, path: path.to_owned(), reason }
    }
}
