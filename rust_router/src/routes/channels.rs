//! Pathways as sets of channels.
//!
//! The channel set of a pathway is the union of the channels of its experts over all layers. |P ∩
//! Q| is therefore the sum over layers of |expert ∩ expert|. These numbers are looked up in small
//! tables, and no mask is built for a sample.

use crate::routes::error::{Error, Result};
use crate::routes::log::Table;

/// The channels of every expert of one MoE layer.
#[derive(Clone, Debug)]
struct LayerChannels {
    num_channels: usize,
    /// `[expert, channel]`.
    members: Vec<bool>,
}

impl LayerChannels {
    fn expert(&self, expert: usize) -> &[bool] {
        &self.members[expert * self.num_channels..][..self.num_channels]
    }

    fn num_experts(&self) -> usize {
        self.members.len() / self.num_channels
    }
}

pub(crate) fn overlap(a: &[bool], b: &[bool]) -> u32 {
    a.iter().zip(b).map(|(&a, &b)| u32::from(a && b)).sum()
}

/// The channels of every expert of every MoE layer.
#[derive(Clone, Debug)]
pub struct Channels {
    layers: Vec<LayerChannels>,
}

impl Channels {
    /// No layers. Add the layers in order with [`Channels::push`].
    #[must_use]
    pub fn new() -> Self {
        Self { layers: Vec::new() }
    }

    /// Adds a layer. `members[expert * num_channels + channel]` is true if the expert computes the
    /// channel.
    ///
    /// # Errors
    /// The layer has no channels, no experts or more than 256 experts, or an expert has no
    /// channels.
    pub fn push(&mut self, members: Vec<bool>, num_channels: usize) -> Result<()> {
        let layer = self.layers.len();
        if num_channels == 0 || members.is_empty() || !members.len().is_multiple_of(num_channels) {
            return Err(Error::EmptyLayer { layer });
        }
        let added = LayerChannels { num_channels, members };
        let num_experts = added.num_experts();
        if num_experts > 256 {
            return Err(Error::TooManyExperts { layer, num_experts });
        }
        if let Some(expert) = (0..num_experts).find(|&e| !added.expert(e).contains(&true)) {
            return Err(Error::NoChannels { layer, expert });
        }
        self.layers.push(added);
        Ok(())
    }

    /// Number of channels of all layers together.
    #[must_use]
    pub fn num_channels(&self) -> usize {
        self.layers.iter().map(|layer| layer.num_channels).sum()
    }

    /// Number of channels of each expert, by layer.
    pub(crate) fn sizes(&self) -> Vec<Vec<u32>> {
        self.by_expert(|_, expert| overlap(expert, expert))
    }

    /// `number(start, members)` of each expert, by layer. `start` is the first channel of the
    /// layer.
    pub(crate) fn by_expert(&self, number: impl Fn(usize, &[bool]) -> u32) -> Vec<Vec<u32>> {
        let mut start = 0;
        let mut tables = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            tables.push((0..layer.num_experts()).map(|e| number(start, layer.expert(e))).collect());
            start += layer.num_channels;
        }
        tables
    }

    pub(crate) fn check(&self, table: &Table) -> Result<()> {
        if table.num_layers() == self.layers.len() && !self.layers.is_empty() {
            return Ok(());
        }
        Err(Error::NumLayers { expected: table.num_layers(), got: self.layers.len() })
    }
}

impl Default for Channels {
    fn default() -> Self {
        Self::new()
    }
}

/// The sum over the experts of a pathway. `tables[layer][expert]` is the number of one expert.
pub(crate) fn sum(tables: &[Vec<u32>], pathway: &[u8]) -> Result<u32> {
    let parts = tables.iter().zip(pathway).map(|(table, &expert)| table.get(usize::from(expert)).copied());
    parts
        .sum::<Option<u32>>()
        .ok_or_else(|| Error::Pathway { num_experts: tables.iter().map(Vec::len).collect(), pathway: pathway.to_vec() })
}

/// |expert ∩ expert| for all pairs of experts of each layer.
pub(crate) struct ExpertPairs {
    /// Number of experts N and `[N, N]`, for each layer.
    pub(crate) layers: Vec<(usize, Vec<u32>)>,
}

impl ExpertPairs {
    pub(crate) fn new(channels: &Channels) -> Self {
        let table = |layer: &LayerChannels| {
            let n = layer.num_experts();
            let pairs = (0..n * n).map(|pair| overlap(layer.expert(pair / n), layer.expert(pair % n)));
            (n, pairs.collect())
        };
        Self { layers: channels.layers.iter().map(table).collect() }
    }

    pub(crate) fn intersection(&self, p: &[u8], q: &[u8]) -> u32 {
        let layers = self.layers.iter().zip(p.iter().zip(q));
        layers.map(|((n, pairs), (&a, &b))| pairs[usize::from(a) * n + usize::from(b)]).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::routes::key::Key;
    use crate::routes::log::{RouteLog, Rows};
    use crate::routes::similarity::with_mask;

    pub(crate) fn table(num_experts: &[u16], experts: &[u8]) -> Table {
        let n = experts.len() / num_experts.len();
        let indices: Vec<i64> = (0..n as i64).collect();
        let classes = vec![0; n];
        let mut log = RouteLog::new(num_experts.to_vec()).unwrap();
        let key = Key { condition: "clean".into(), epoch: 0 };
        let rows = Rows { indices: &indices, experts, labels: &classes, predictions: &classes };
        log.append(key.clone(), rows).unwrap();
        log.table(&key).unwrap().clone()
    }

    /// Experts as circular windows of channels, of sizes that differ from layer to layer and, if
    /// asked, by expert.
    pub(crate) fn windows(num_experts: &[u16], uneven: bool) -> Channels {
        let mut channels = Channels::new();
        for (layer, &n) in num_experts.iter().enumerate() {
            let (n, c) = (usize::from(n), 5 + 2 * layer);
            let member = |i: usize| {
                let (expert, channel) = (i / c, i % c);
                (channel + c - expert * c / n) % c < 2 + (layer + if uneven { expert } else { 0 }) % 3
            };
            channels.push((0..n * c).map(member).collect(), c).unwrap();
        }
        channels
    }

    /// A pathway's channels written out.
    pub(crate) fn mask(channels: &Channels, pathway: &[u8]) -> Vec<bool> {
        let layers = channels.layers.iter().zip(pathway);
        layers.flat_map(|(layer, &expert)| layer.expert(usize::from(expert)).to_vec()).collect()
    }

    pub(crate) fn slow_iou(a: &[bool], b: &[bool]) -> (u32, u32) {
        (overlap(a, b), a.iter().zip(b).map(|(&a, &b)| u32::from(a || b)).sum())
    }

    #[test]
    fn channels_and_masks_of_another_model_are_refused() {
        let table = table(&[2, 2], &[0, 0]);
        let message = |error: Error| error.to_string();
        let wrong = with_mask(&table, &windows(&[2], true), &[true; 5]).unwrap_err();
        assert_eq!(message(wrong), "expected the channels of 2 MoE layers (at least one), got 1");
        let wrong = with_mask(&table, &windows(&[2, 2], true), &[true; 5]).unwrap_err();
        assert_eq!(message(wrong), "expected a mask of 12 channels, got 5");
        let wrong = Channels::new().push(vec![true, false], 1).unwrap_err();
        assert_eq!(message(wrong), "expert 1 of MoE layer 0 has no channels");
    }
}
