//! Which experts each sample took, and statistics of these pathways.
//!
//! A [`log`] keeps one byte per sample and MoE layer. [`pathways`] counts them. As sets of [`channels`], pathways are
//! compared one by one ([`similarity`]) and all with each other ([`diversity`]).

pub mod channels;
pub mod diversity;
pub mod error;
pub mod file;
pub mod log;
pub mod pathways;
pub mod similarity;

pub use error::{Error, Result};
