//! One error type: each message says what was expected, what came, and for a sample which one it is.

use std::path::{Path, PathBuf};

/// What can go wrong with input. A mistake of our own is a panic, not one of these.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument that cannot be carried out.
    #[error("{0}")]
    Argument(String),
    /// A row that the source does not have.
    #[error("row {row} is outside the {len} images of the source; use rows from 0 to {}", len.saturating_sub(1))]
    Row {
        /// The row asked for.
        row: i64,
        /// How many rows there are.
        len: usize,
    },
    /// An image that cannot be read or decoded.
    #[error("image {row} ({} at byte {offset}): {reason}", file.display())]
    Sample {
        /// Its row.
        row: usize,
        /// The file it lies in.
        file: PathBuf,
        /// Where it begins there.
        offset: u64,
        /// Why it cannot be shown.
        reason: String,
    },
    /// The caller asked to stop.
    #[error("loading was stopped by its caller")]
    Stopped,
    /// A pool of threads that the system did not give.
    #[error("cannot start {num_threads} loader threads ({reason}); use fewer")]
    Threads {
        /// How many were asked for.
        num_threads: usize,
        /// The system's words.
        reason: String,
    },
    /// A file that cannot be read or written.
    #[error("cannot {verb} {}: {reason}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// A file that is not what it should be.
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

impl Error {
    /// An [`Error::Io`].
    #[must_use]
    pub fn io(verb: &'static str, path: &Path, reason: std::io::Error) -> Self {
        Self::Io { verb, path: path.to_owned(), reason }
    }
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
