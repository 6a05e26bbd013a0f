//! What can go wrong with routes. A mistake of this crate itself is a panic instead.

use super::log::{Key, MAX_CONDITION};
use crate::error::FileError;

/// Most classes that load is counted for.
pub const MAX_CLASSES: usize = 1 << 20;

/// Most bins of a histogram.
pub const MAX_BINS: usize = 1 << 20;

/// One variant per cause; the message says what was expected and what came.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model with an impossible number of experts.
    #[error("expected 1 to 256 experts in every MoE layer, got {num_experts} in layer {layer}")]
    NumExperts {
        /// The MoE layer.
        layer: usize,
        /// Its number of experts.
        num_experts: usize,
    },
    /// A condition that cannot have this name.
    #[error("expected a condition's name of 1 to {MAX_CONDITION} characters, got {name:?}")]
    ConditionName {
        /// The name.
        name: String,
    },
    /// A column without one entry per sample.
    #[error("expected {expected} {column}, one for each sample, got {len}")]
    ColumnLength {
        /// Name of the column.
        column: &'static str,
        /// Number of samples.
        expected: usize,
        /// Length of the column.
        len: usize,
    },
    /// A table of experts without one entry per sample and layer.
    #[error("expected {num_samples} x {num_layers} expert indices (samples x MoE layers), got {len}")]
    ExpertTable {
        /// Number of samples.
        num_samples: usize,
        /// Number of MoE layers.
        num_layers: usize,
        /// Entries of the table.
        len: usize,
    },
    /// A negative sample index.
    #[error("expected sample indices from 0, got {index}")]
    SampleIndex {
        /// The index.
        index: i64,
    },
    /// A class below -1.
    #[error("expected classes from 0, or -1 for unknown, got {class}")]
    Class {
        /// The class.
        class: i32,
    },
    /// An expert that its layer does not have.
    #[error("expected experts 0 to {last} in MoE layer {layer}, got {expert}")]
    Expert {
        /// The MoE layer.
        layer: usize,
        /// Its last expert.
        last: u16,
        /// The expert.
        expert: u8,
    },
    /// A log of another model.
    #[error("expected a route log of {ours:?} experts per MoE layer, got {theirs:?}")]
    OtherModel {
        /// Experts per layer of this log.
        ours: Vec<u16>,
        /// Experts per layer of the other.
        theirs: Vec<u16>,
    },
    /// A condition without rows.
    #[error("the route log has no {:?} of epoch {}; it has {}", key.condition, key.epoch, listed(known))]
    NoSuchCondition {
        /// What was asked for.
        key: Key,
        /// What there is.
        known: Vec<Key>,
    },
    /// Two conditions without a common sample.
    #[error("expected samples that both conditions have, found none")]
    NothingInCommon,
    /// An impossible number of classes.
    #[error("expected 1 to {MAX_CLASSES} classes, got {num_classes}")]
    NumClasses {
        /// The number.
        num_classes: usize,
    },
    /// A label that is unknown or no class.
    #[error("expected labels 0 to {last}, got {label} for sample {index}")]
    Label {
        /// The last class.
        last: usize,
        /// The label.
        label: i32,
        /// Index of the sample.
        index: i64,
    },
    /// A layer without channels or experts.
    #[error("expected [experts, channels] for MoE layer {layer}, got an empty table")]
    EmptyLayer {
        /// The MoE layer.
        layer: usize,
    },
    /// A layer with more experts than a byte can tell apart.
    #[error("expected at most 256 experts in MoE layer {layer}, got {num_experts}")]
    TooManyExperts {
        /// The MoE layer.
        layer: usize,
        /// Its number of experts.
        num_experts: usize,
    },
    /// An expert that computes nothing.
    #[error("expert {expert} of MoE layer {layer} has no channels")]
    NoChannels {
        /// The MoE layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// Channels of a model with other layers.
    #[error("expected the channels of {expected} MoE layers (at least one), got {got}")]
    NumLayers {
        /// Layers of the log.
        expected: usize,
        /// Layers with channels.
        got: usize,
    },
    /// A pathway through experts that have no channels.
    #[error("expected a pathway through {num_experts:?} experts per MoE layer, got {pathway:?}")]
    Pathway {
        /// Experts of each layer.
        num_experts: Vec<usize>,
        /// The pathway.
        pathway: Vec<u8>,
    },
    /// A mask of another length than the channels'.
    #[error("expected a mask of {expected} channels, got {got}")]
    MaskLength {
        /// Channels of all layers.
        expected: usize,
        /// Length of the mask.
        got: usize,
    },
    /// Too few samples to compare.
    #[error("expected at least 2 samples, got {num_samples}")]
    TooFewSamples {
        /// How many there are.
        num_samples: usize,
    },
    /// An impossible number of bins.
    #[error("expected 1 to {MAX_BINS} bins, got {num_bins}")]
    NumBins {
        /// The number.
        num_bins: usize,
    },
    /// A log that cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

fn listed(known: &[Key]) -> String {
    if known.is_empty() {
        return "nothing".to_owned();
    }
    known.iter().map(|key| format!("{} (epoch {})", key.condition, key.epoch)).collect::<Vec<_>>().join(", ")
}

/// Result with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
