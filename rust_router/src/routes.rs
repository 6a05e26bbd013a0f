//! The log of routing decisions, and statistics of pathways.
//!
//! A pathway is the list of experts that a sample took, one per MoE layer. A [`log`] stores one
//! byte per sample and MoE layer. [`pathways`] counts equal pathways. [`channels`] converts a
//! pathway to the set of channels that it computes. [`similarity`] compares two pathways of one
//! sample, and [`diversity`] the pathways of all pairs of samples.

pub mod channels;
pub mod diversity;
pub mod error;
pub mod file;
pub mod key;
pub mod log;
pub mod pathways;
pub mod similarity;

pub use error::{Error, Result};
