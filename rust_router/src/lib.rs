#![doc = include_str!("../README.md")]

pub mod atomic;
pub mod error;
pub mod images;
pub mod rng;
pub mod routes;

#[cfg(feature = "python")]
mod python;
