//! The keys of the route log.

/// Highest number of characters in the name of a condition.
pub const MAX_CONDITION: usize = 128;

/// The condition under which samples were routed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// "clean", or the name of the attack.
    pub condition: String,
    /// The epoch of training; 0 outside training.
    pub epoch: u32,
}
