//! What can go wrong with images. A mistake of this crate itself is a panic instead.

use std::path::PathBuf;

use super::geometry::Size;
use crate::error::FileError;

/// One variant per cause; the message says what was expected, what came and, for an image, which one it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A loader without threads.
    #[error("expected at least 1 loader thread, got 0")]
    NoThreads,
    /// A pool of threads that the system did not give.
    #[error("cannot start {num_threads} loader threads ({reason}); use fewer")]
    Threads {
        /// How many were asked for.
        num_threads: usize,
        /// The system's words.
        reason: String,
    },
    /// A buffer that does not hold the batch.
    #[error("expected a buffer of {num_images} x {} x {} x 3, got {elements} elements", size.0, size.1)]
    Buffer {
        /// Images of the batch.
        num_images: usize,
        /// Their height and width.
        size: Size,
        /// Elements of the buffer.
        elements: usize,
    },
    /// Raw bytes that are not a whole number of images.
    #[error("expected whole {}x{} RGB images ({} bytes), got {bytes} bytes", size.0, size.1, size.0 * size.1 * 3)]
    Pixels {
        /// Height and width of each image.
        size: Size,
        /// How many bytes there are.
        bytes: usize,
    },
    /// A place of an encoded image that cannot be one.
    #[error("image {row} is said to be {length} bytes of file {file}; expected at most {most}, of {num_files} files")]
    Span {
        /// Row of the image.
        row: usize,
        /// Its length in bytes.
        length: u64,
        /// Number of its file.
        file: u32,
        /// The greatest length.
        most: u64,
        /// How many files there are.
        num_files: usize,
    },
    /// A row that the source does not have.
    #[error("row {row} is outside the {len} images of the source; use rows from 0 to {}", len.saturating_sub(1))]
    Row {
        /// The row asked for.
        row: i64,
        /// How many rows there are.
        len: usize,
    },
    /// An image whose size is not the batch's, under a transform that does not resize.
    #[error(
        "expected images of {}x{}, but image {index} is {}x{}; resize them, or load sizes apart",
        expected.0, expected.1, size.0, size.1
    )]
    ImageSize {
        /// Row of the image.
        index: u64,
        /// Its height and width.
        size: Size,
        /// Those of the batch.
        expected: Size,
    },
    /// A shorter side that leaves no room for the middle.
    #[error("expected to resize to at least {}x{}, got {resize}", out.0, out.1)]
    ResizeTooSmall {
        /// Length of the shorter side.
        resize: usize,
        /// Height and width of the middle.
        out: Size,
    },
    /// An image that cannot be resized as asked.
    #[error("image {row}: {reason}")]
    Resize {
        /// Row of the image.
        row: usize,
        /// Why not.
        reason: String,
    },
    /// An image that cannot be read or decoded.
    #[error("image {row} ({} at byte {offset}): {reason}", file.display())]
    Sample {
        /// Its row.
        row: usize,
        /// The file it lies in.
        file: PathBuf,
        /// Where it begins in the file.
        offset: u64,
        /// Why it cannot be shown.
        reason: String,
    },
    /// An image without bytes that was to be packed.
    #[error("image {row} has no bytes; leave it out or fetch its source again")]
    Empty {
        /// Its row in the pack.
        row: usize,
    },
    /// The caller asked to stop.
    #[error("loading was stopped by its caller")]
    Stopped,
    /// A file that cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Result with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
