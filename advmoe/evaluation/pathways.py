"""Pathways as sets of channels: their similarity to the mask of a Sparse-CNN and to each other (paper, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import ConfigError
from advmoe.models.masked import mask_pathway
from advmoe.models.network import RoutedNetwork
from advmoe.routing_log import Condition, Diversity, PathwayChannels, RouteLog

BINS = 40
"""Bins of the histograms of IoU."""


@dataclass(frozen=True, kw_only=True)
class MaskSimilarity:
    """Similarity of pathways to a Sparse-CNN's mask pathway, under one condition."""

    condition: str
    iou: NDArray[np.float64]
    """[n] |P and M| / |P or M| over the channels of all MoE layers."""
    cosine: NDArray[np.float64]
    """[n] of the two sets as 0/1 vectors."""


def pathway_channels(model: RoutedNetwork) -> PathwayChannels:
    """The channels that each expert of each MoE layer computes: those of the backbone, or own filters (`separate`)."""
    layouts = model.expert_layouts
    return PathwayChannels(
        [[layout.channels(expert) for expert in range(layout.num_experts)] for layout in layouts],
        [max(layout.num_channels, layout.num_experts * layout.size) for layout in layouts],
    )


def mask_of(model: RoutedNetwork, routed: RoutedNetwork) -> NDArray[np.bool_]:
    """The mask pathway of a Sparse-CNN as one mask over the channels of all MoE layers of a routed network, [C].

    Raises:
        ConfigError: Not a Sparse-CNN, or the experts are not channels of its backbone.
    """
    every, at = mask_pathway(model), routed.routed_places
    widths = [table.shape[1] for table in pathway_channels(routed).tables]
    there = at if len(model.routable) == len(routed.routable) else range(len(every))
    kept = [every[place] for place in there]
    full = [model.routable[place].full for place in there]
    if full != widths:
        raise ConfigError(
            f"the Sparse-CNN prunes {len(full)} layers with {sum(full)} channels, the MoE-CNN's experts share out "
            f"{len(widths)} layers with {sum(widths)}; compare models on one backbone, experts that are its windows"
        )
    return np.concatenate([np.isin(np.arange(width), channels) for channels, width in zip(kept, widths, strict=True)])


def mask_similarity(
    log: RouteLog, conditions: Sequence[str], channels: PathwayChannels, mask: NDArray[np.bool_]
) -> list[MaskSimilarity]:
    """IoU and cosine of every pathway with the mask, condition by condition."""
    similar = []
    for condition in conditions:
        iou, cosine = log.mask_similarity(condition, channels, mask)
        similar.append(MaskSimilarity(condition=condition, iou=iou, cosine=cosine))
    return similar


def reachable_iou(model: RoutedNetwork, mask: NDArray[np.bool_]) -> tuple[float, float]:
    """The least and the largest IoU with a mask [C] that any pathway of a network has, whatever its routers choose.

    All experts of a layer have equally many channels, so the IoU grows with the number of channels
    that pathway and mask have in common. Each router adds to it by the layers that it decides for.
    """
    tables = pathway_channels(model).tables
    parts = np.split(mask, np.cumsum([table.shape[1] for table in tables])[:-1])
    in_common: dict[int, NDArray[np.int64]] = {}
    for router, table, part in zip(model.router_of_layer, tables, parts, strict=True):
        in_common[router] = in_common.get(router, 0) + (table & part).sum(axis=1)
    total = sum(int(table[0].sum()) for table in tables) + int(mask.sum())
    least, largest = (sum(int(choose(common)) for common in in_common.values()) for choose in (np.min, np.max))
    return least / (total - least), largest / (total - largest)


def diversity(log: RouteLog, condition: Condition, channels: PathwayChannels) -> Diversity:
    """IoU of pathways over pairs of images; it is 1 if all images take one pathway."""
    return log.diversity(condition, channels, bins=BINS)
