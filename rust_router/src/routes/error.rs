//! Errors of routes. A bug of this crate causes a panic instead.

use crate::error::FileError;
use crate::routes::key::{Key, MAX_CONDITION};

/// Highest number of classes for which load is counted.
pub const MAX_CLASSES: usize = 1 << 20;

/// Highest number of bins of a histogram.
pub const MAX_BINS: usize = 1 << 20;

/// An error with one variant per cause. Messages contain the expected value and the actual value.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer has no experts or more than 256.
    #[error("expected 1 to 256 experts in every MoE layer, got {num_experts} in layer {layer}")]
    NumExperts {
        /// The MoE layer.
        layer: usize,
        /// Its number of experts.
        num_experts: usize,
    },
    /// The name of a condition is empty or too long, or contains a null character.
    #[error("expected a condition's name of 1 to {MAX_CONDITION} characters, got {name:?}")]
    ConditionName {
        /// The name.
        name: String,
    },
    /// A column does not have one entry per sample.
    #[error("expected {expected} {column}, one for each sample, got {len}")]
    ColumnLength {
        /// Name of the column.
        column: &'static str,
        /// Number of samples.
        expected: usize,
        /// Length of the column.
        len: usize,
    },
    /// The table of experts does not have one entry per sample and layer.
    #[error("expected {num_samples} x {num_layers} expert indices (samples x MoE layers), got {len}")]
    ExpertTable {
        /// Number of samples.
        num_samples: usize,
        /// Number of MoE layers.
        num_layers: usize,
        /// Number of entries of the table.
        len: usize,
    },
    /// A sample index is negative.
    #[error("expected sample indices from 0, got {index}")]
    SampleIndex {
        /// The index.
        index: i64,
    },
    /// A class is below -1.
    #[error("expected classes from 0, or -1 for unknown, got {class}")]
    Class {
        /// The class.
        class: i32,
    },
    /// An expert index is too large for its layer.
    #[error("expected experts 0 to {last} in MoE layer {layer}, got {expert}")]
    Expert {
        /// The MoE layer.
        layer: usize,
        /// Highest expert index of the layer.
        last: u16,
        /// The expert.
        expert: u8,
    },
    /// Two logs belong to different models.
    #[error("expected a route log of {ours:?} experts per MoE layer, got {theirs:?}")]
    OtherModel {
        /// Number of experts per layer in this log.
        ours: Vec<u16>,
        /// Number of experts per layer in the other log.
        theirs: Vec<u16>,
    },
    /// The log has no rows of this condition.
    #[error("the route log has no {:?} of epoch {}; it has {}", key.condition, key.epoch, listed(known))]
    NoSuchCondition {
        /// The requested condition.
        key: Key,
        /// The conditions of the log.
        known: Vec<Key>,
    },
    /// Two conditions have no common sample.
    #[error("expected samples that both conditions have, found none")]
    NothingInCommon,
    /// The number of classes is out of range.
    #[error("expected 1 to {MAX_CLASSES} classes, got {num_classes}")]
    NumClasses {
        /// The number.
        num_classes: usize,
    },
    /// The counts of a load do not fit in memory.
    #[error(
        "expected counts that fit in memory, got {num_layers} MoE layers x {num_classes} classes x {max_experts} \
         experts; use fewer classes"
    )]
    Counts {
        /// Number of MoE layers.
        num_layers: usize,
        /// Number of classes.
        num_classes: usize,
        /// Number of experts of the largest layer.
        max_experts: usize,
    },
    /// A label is unknown or out of range.
    #[error("expected labels 0 to {last}, got {label} for sample {index}")]
    Label {
        /// Highest class.
        last: usize,
        /// The label.
        label: i32,
        /// Index of the sample.
        index: i64,
    },
    /// A layer has no channels or no experts.
    #[error("expected [experts, channels] for MoE layer {layer}, got an empty table")]
    EmptyLayer {
        /// The MoE layer.
        layer: usize,
    },
    /// A layer has more than 256 experts.
    #[error("expected at most 256 experts in MoE layer {layer}, got {num_experts}")]
    TooManyExperts {
        /// The MoE layer.
        layer: usize,
        /// Its number of experts.
        num_experts: usize,
    },
    /// An expert has no channels.
    #[error("expert {expert} of MoE layer {layer} has no channels")]
    NoChannels {
        /// The MoE layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// Channels and log have different numbers of layers.
    #[error("expected the channels of {expected} MoE layers (at least one), got {got}")]
    NumLayers {
        /// Number of layers of the log.
        expected: usize,
        /// Number of layers with channels.
        got: usize,
    },
    /// A pathway contains an expert without a table of channels.
    #[error("expected a pathway through {num_experts:?} experts per MoE layer, got {pathway:?}")]
    Pathway {
        /// Number of experts of each layer.
        num_experts: Vec<usize>,
        /// The pathway.
        pathway: Vec<u8>,
    },
    /// The length of a mask differs from the number of channels.
    #[error("expected a mask of {expected} channels, got {got}")]
    MaskLength {
        /// Number of channels of all layers.
        expected: usize,
        /// Length of the mask.
        got: usize,
    },
    /// There are fewer than two samples.
    #[error("expected at least 2 samples, got {num_samples}")]
    TooFewSamples {
        /// Number of samples.
        num_samples: usize,
    },
    /// The number of bins is out of range.
    #[error("expected 1 to {MAX_BINS} bins, got {num_bins}")]
    NumBins {
        /// The number.
        num_bins: usize,
    },
    /// Pairs would have to be sampled, and the number of sampled pairs is 0.
    #[error("expected at least 1 sampled pair, got 0")]
    NoPairs,
    /// A log cannot be read or written.
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
