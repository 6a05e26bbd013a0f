//! Deterministic image batches and per-sample routing bookkeeping for mixture-of-experts CNNs.
//!
//! Everything here works without Python; `python.rs`, behind the feature of the same name, is the only file that
//! knows of it and only converts.
//!
//! Data flows one way: a [`source`] yields RGB bytes, [`augment`] decides from counter-based random numbers
//! ([`rng`]) which part of them is seen, and [`loader`] writes a [`batch`] into a buffer the caller owns. A [`route_log`]
//! keeps which experts every sample took; [`pathways`] counts them, and as sets of [`channels`] they are compared one by
//! one ([`similarity`]) and all with each other ([`diversity`]).

pub mod atomic;
pub mod augment;
pub mod batch;
pub mod channels;
pub mod decode;
pub mod diversity;
pub mod error;
pub mod loader;
pub mod pack;
pub mod pathways;
pub mod resize;
pub mod rng;
pub mod route_file;
pub mod route_log;
pub mod shard;
pub mod similarity;
pub mod source;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};
