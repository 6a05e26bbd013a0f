//! From encoded or raw images to batches.
//!
//! A [`source`] returns the RGB bytes of an image. [`augment`] selects a part of the image by
//! counter-based random numbers. [`loader`] writes the result into a buffer that the caller owns.

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
