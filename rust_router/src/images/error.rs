//! Errors of images. A bug of this crate causes a panic instead.

use std::path::PathBuf;

use super::geometry::Size;
use crate::error::FileError;

/// Highest number of loader threads.
pub const MAX_THREADS: usize = 1024;

/// An error with one variant per cause. Messages contain the expected value, the actual value, and
/// the image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The number of loader threads is out of range.
    #[error("expected 1 to {MAX_THREADS} loader threads, got {num_threads}")]
    NumThreads {
        /// The number.
        num_threads: usize,
    },
    /// The system cannot start the threads.
    #[error("cannot start {num_threads} loader threads ({reason}); use fewer")]
    Threads {
        /// Requested number of threads.
        num_threads: usize,
        /// The system's error.
        reason: String,
    },
    /// The buffer does not have the size of the batch.
    #[error("expected a buffer of {num_images} x {} x {} x 3, got {elements} elements", size.0, size.1)]
    Buffer {
        /// Number of images in the batch.
        num_images: usize,
        /// Height and width of the images.
        size: Size,
        /// Number of elements of the buffer.
        elements: usize,
    },
    /// The raw bytes are not a whole number of images.
    #[error("expected whole {}x{} RGB images ({} bytes), got {bytes} bytes", size.0, size.1, size.0 * size.1 * 3)]
    Pixels {
        /// Height and width of each image.
        size: Size,
        /// Number of bytes.
        bytes: usize,
    },
    /// The position of an encoded image is impossible.
    #[error("image {row} is said to be {length} bytes of file {file}; expected at most {most}, of {num_files} files")]
    Span {
        /// Row of the image.
        row: usize,
        /// Its length in bytes.
        length: u64,
        /// Number of its file.
        file: u32,
        /// Highest allowed length in bytes.
        most: u64,
        /// Number of files.
        num_files: usize,
    },
    /// The source does not have this row.
    #[error("row {row} is outside the {len} images of the source; use rows from 0 to {}", len.saturating_sub(1))]
    Row {
        /// The requested row.
        row: i64,
        /// Number of rows.
        len: usize,
    },
    /// The size of an image differs from the size of the batch, and the transform does not resize.
    #[error(
        "expected images of {}x{}, but image {index} is {}x{}; resize them, or load sizes apart",
        expected.0, expected.1, size.0, size.1
    )]
    ImageSize {
        /// Row of the image.
        index: u64,
        /// Height and width of the image.
        size: Size,
        /// Height and width in the batch.
        expected: Size,
    },
    /// The resized image is smaller than the crop.
    #[error("expected to resize to at least {}x{}, got {resize}", out.0, out.1)]
    ResizeTooSmall {
        /// Length of the shorter side after resizing.
        resize: usize,
        /// Height and width of the crop.
        out: Size,
    },
    /// An image cannot be resized.
    #[error("image {row}: {reason}")]
    Resize {
        /// Row of the image.
        row: usize,
        /// The reason.
        reason: String,
    },
    /// An image cannot be read or decoded.
    #[error("image {row} ({} at byte {offset}): {reason}", file.display())]
    Sample {
        /// Row of the image.
        row: usize,
        /// The file that contains the image.
        file: PathBuf,
        /// The image's first byte in the file.
        offset: u64,
        /// The reason.
        reason: String,
    },
    /// An image to be packed has no bytes.
    #[error("image {row} has no bytes; leave it out or fetch its source again")]
    Empty {
        /// Row of the image in the pack.
        row: usize,
    },
    /// The caller stopped the batch.
    #[error("loading was stopped by its caller")]
    Stopped,
    /// An error of a file.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Result with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
