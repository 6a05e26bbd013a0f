"""Sparse-CNN after training: packs the kept channels into a network without the others.

Shape suffixes: C channels, O outputs, P places of a channel.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from advmoe.errors import ConfigError
from advmoe.models.channels import ChannelMask, KeptChannels
from advmoe.models.layers import Conv2d, Linear, Norm
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model


def masks_open(model: RoutedNetwork) -> bool:
    """Whether a Sparse-CNN still uses all channels, as Dense does."""
    first = next(iter(model.masks), None)
    return isinstance(first, ChannelMask) and bool(first.open)


def open_masks(model: RoutedNetwork) -> None:
    """Let a Sparse-CNN use all channels."""
    for mask in model.masks:
        if isinstance(mask, ChannelMask):
            mask.open.fill_(True)


def close_masks(model: RoutedNetwork) -> None:
    """Start to learn the channel masks. Scores come from the present weights, and only channels
    with the highest scores count.
    """
    init_scores(model)
    for mask in model.masks:
        if isinstance(mask, ChannelMask):
            mask.open.fill_(False)


@torch.no_grad()
def init_scores(model: RoutedNetwork) -> None:
    """Start each mask from the weights that read its channels: L2 norms, at most 1 (HYDRA's scaled initialization)."""
    norms = {mask: torch.zeros_like(mask.scores) for mask in model.masks if isinstance(mask, ChannelMask)}
    for layer in model.modules():
        if isinstance(layer, Conv2d | Linear) and layer.reads.masked:
            square_C = layer.weight.square().sum(dim=0).reshape(layer.reads.size, -1).sum(dim=1)
            parts = square_C.split([mask.scores.numel() for mask in layer.reads.masks if isinstance(mask, ChannelMask)])
            for mask, part in zip(layer.reads.masks, parts, strict=True):
                norms[mask] += part  # type: ignore[index]
    for mask, square in norms.items():
        mask.scores.copy_(square.sqrt() / square.sqrt().max().clamp_min(1e-12))


@torch.no_grad()
def compact(model: RoutedNetwork) -> RoutedNetwork:
    """A network with the kept channels of a Sparse-CNN only. Its outputs are equal; its size and
    cost are those of S-Dense.

    Args:
        model: A Sparse-CNN whose masks are final.

    Returns:
        A new network in the same mode, on the same device; the given one if it is compact already.

    Raises:
        ConfigError: The model is not a Sparse-CNN, or its masks are open.
    """
    _require_masks(model, "can be compacted")
    if model.config.compact:
        return model
    with torch.device("meta"):
        small = build_model(dataclasses.replace(model.config, compact=True))
    weights = model.state_dict()
    for name, layer in model.named_modules():
        for entry, value in _kept_entries(layer).items():
            weights[f"{name}.{entry}"] = value
    for index, mask in enumerate(model.masks):
        del weights[f"masks.{index}.scores"], weights[f"masks.{index}.open"]
        weights[f"masks.{index}.channels"] = mask.kept_channels()  # type: ignore[operator]
    small.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    return small.train(model.training)


def _require_masks(model: RoutedNetwork, what: str) -> None:
    kind = model.config.kind
    if kind != "sparse_cnn":
        raise ConfigError(f"only a Sparse-CNN {what}, got a model of kind '{kind}'")
    if masks_open(model):
        raise ConfigError(
            f"only a Sparse-CNN with learned masks {what}, but these are not learned yet: train it further"
        )


def _kept_entries(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of one layer that belong to channels, without the rows and columns of dropped channels."""
    if isinstance(layer, Norm):
        rows = layer.writes.kept_channels()
        return {name: value[rows] for name, value in layer.state_dict().items() if value.ndim}
    if isinstance(layer, Conv2d):
        return {"weight": layer.weight[layer.writes.kept_channels()][:, layer.reads.kept_channels()]}
    if isinstance(layer, Linear):
        rows = layer.writes.kept_channels()
        weight_OCP = layer.weight[rows].unflatten(1, (layer.reads.size, layer.places))
        weight = weight_OCP[:, layer.reads.kept_channels()].flatten(1)
        return {"weight": weight, "bias": layer.bias[rows]}
    return {}


def mask_pathway(model: RoutedNetwork) -> tuple[tuple[int, ...], ...]:
    """The data-agnostic pathway M of a Sparse-CNN: the channels it keeps in each layer that MoE-CNN would route.

    The layers have the order of `expert_layouts` of the MoE-CNN on the same backbone. The numbers
    are backbone channels, as in `ExpertLayout.channels`. Pathways and mask can therefore be
    compared (paper, Fig. 6).

    Raises:
        ConfigError: The model is not a Sparse-CNN, or its masks are open.
    """
    _require_masks(model, "has a mask pathway")
    return tuple(
        tuple(mask.kept_channels().tolist())
        for channels in model.routable
        for mask in channels.masks
        if isinstance(mask, ChannelMask | KeptChannels)
    )
