//! From encoded or raw images to batches.
//!
//! A [`source`] shows the RGB bytes of an image, [`augment`] decides from counter-based random numbers which part of
//! them is seen, and [`loader`] writes the result into a buffer that the caller owns.

pub mod augment;
pub mod batch;
pub mod decode;
pub mod error;
pub mod geometry;
pub mod loader;
pub mod pack;
pub mod resize;
pub mod source;

pub use error::{Error, Result};
