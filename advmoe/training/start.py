"""The initial weights of a run that starts from a checkpoint."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from advmoe.config import ExpertsConfig, ModelConfig, RoutersConfig, Upcycling, differences
from advmoe.errors import ConfigError
from advmoe.models.channels import ChannelMask
from advmoe.models.masked import close_masks, compact, masks_open
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.models.vit import MLP, RoutedMLP
from advmoe.schema import fields_of
from advmoe.seeding import generator_for, seeded
from advmoe.training.checkpoint import Checkpoint, load_weights
from advmoe.training.coupling import expert_layers, rows_of_some, slot_of_row


def has_other_classes(initial: Checkpoint, num_classes: int, class_names: tuple[str, ...]) -> bool:
    """Whether a checkpoint's outputs stand for other classes than those of a run. Names may be unknown, and empty."""
    names = initial.class_names
    return initial.model.num_classes != num_classes or bool(names and class_names and names != class_names)


def with_new_classifier(
    initial: Checkpoint, num_classes: int, class_names: tuple[str, ...] = (), *, seed: int = 0
) -> Checkpoint:
    """A checkpoint with the same features and a fresh classifier for other classes.

    Args:
        initial: The checkpoint.
        num_classes: Number of outputs of the new classifier.
        class_names: Name of each output; may be empty.
        seed: Seed of its weights.
    """
    described = dataclasses.replace(initial.model, num_classes=num_classes)
    with seeded(seed):
        fresh = build_model(described).state_dict()
    own = {name: value for name, value in fresh.items() if name.startswith("classifier.")}
    return dataclasses.replace(
        initial, model=described, weights={**initial.weights, **own}, class_names=class_names, training_weights=None
    )


def start_from(
    model: RoutedNetwork,
    initial: Checkpoint,
    *,
    upcycling: Upcycling = "copies",
    reinitialize: float = 0.0,
    seed: int = 0,
) -> None:
    """Give a fresh model the weights of a checkpoint.

    The checkpoint holds the same model, or a network whose weights become experts (upcycling): an
    S-Dense, a Sparse-CNN or a Dense of the backbone. Every expert then starts as a copy of that
    pathway, and routers start fresh. A Dense is first cut down: to the channels with the largest
    weights, as at the start of AT (Sparse), or for each expert to its own window of the channels.
    What all experts share, such as BatchNorm, then starts with the mean over experts. In ViT each
    expert gets its own window of the hidden units. A Sparse-CNN may also start from its Dense.

    Args:
        model: The model that gets the weights.
        initial: The checkpoint.
        upcycling: How a Dense is cut down: `copies` of the largest channels, or `windows`.
        reinitialize: Share of every expert's own filters that are drawn anew from the normal
            distribution with the bank's mean and deviation, so that experts differ from the start
            (Drop-Upcycling, Nakamura et al., 2025).
        seed: Seed of the filters drawn anew.

    Raises:
        ConfigError: The checkpoint holds another model, or a Sparse-CNN without masks where experts
            are wanted, or `reinitialize` is given although the checkpoint already has experts, or
            `upcycling` is `windows` and the checkpoint holds no Dense, or windows that overlap, or
            experts that share filters in different slots, so that they cannot all be one copy.
    """
    wanted, kind = model.config, initial.model.kind
    from_dense = wanted.kind == "sparse_cnn" and kind == "dense"
    upcycled = wanted.kind == "moe" and kind != "moe"
    if reinitialize and not upcycled:
        raise ConfigError(
            f"reinitialize {reinitialize:g} is for experts that start from S-Dense, Dense or Sparse-CNN; this "
            f"checkpoint holds kind {kind} and the model to train is of kind {wanted.kind}; leave it out",
            "reinitialize",
        )
    if upcycling == "windows" and not (upcycled and kind == "dense"):
        raise ConfigError(
            f"upcycling windows cuts a Dense into experts; this checkpoint holds kind {kind} and the model to train is "
            f"of kind {wanted.kind}; leave it out",
            "upcycling",
        )
    held = initial.model
    if from_dense or upcycled:
        scale = held.model_scale if kind == "dense" else wanted.model_scale
        wanted = dataclasses.replace(wanted, kind=kind, model_scale=scale, compact=held.compact)
    # a network without experts has no such settings; a stored config may hold some that have no
    # effect
    if upcycled:
        wanted, held = _without_experts(wanted), _without_experts(held)
    if different := differences(held, wanted):
        raise ConfigError(
            f"the checkpoint to start from holds another model: {', '.join(different.values())}; repeat its options",
            "init",
            *different,
        )
    if upcycled:
        _copy_into_experts(model, initial, windows=upcycling == "windows")
        _draw_anew(model, reinitialize, generator_for(seed))
        return
    weights = initial.weights
    if from_dense:
        masks = {name: value for name, value in model.state_dict().items() if name.startswith("masks.")}
        weights = masks | weights
    try:
        load_weights(model, weights)
    except ConfigError as error:
        raise ConfigError(f"the checkpoint to start from has other weights: {error}", "init") from error
    if from_dense:
        close_masks(model)


def _without_experts(config: ModelConfig) -> ModelConfig:
    defaults = {field.name: field.default for cls in (ExpertsConfig, RoutersConfig) for field in fields_of(cls)}
    return dataclasses.replace(config, **defaults)


@torch.no_grad()
def _copy_into_experts(model: RoutedNetwork, initial: Checkpoint, *, windows: bool) -> None:
    """Give every expert the weights of a network without experts, and all other layers theirs."""
    built = initial.build()  # of a Sparse-CNN, the kept channels only
    if initial.model.kind == "sparse_cnn" and masks_open(built):
        raise ConfigError(
            "expected a Sparse-CNN with learned masks to turn into experts, got one that is still dense; "
            "train it further, or start from its Dense",
            "init",
        )
    experts = range(model.config.num_experts)
    if not windows and not (initial.model.kind == "dense" and model.config.arch == "vit"):
        _check_slots(model)
    if initial.model.kind != "dense" or model.config.arch == "vit":
        pathways = [built.state_dict()] * len(experts)
    elif windows:
        _check_disjoint(model)
        pathways = [_cut_down(model, built, expert) for expert in experts]
    else:
        pathways = [_cut_down(model, built)] * len(experts)
    source = {name: _mean([pathway[name] for pathway in pathways]) for name in pathways[0]}
    target = model.state_dict()
    routed: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, MoEConv2d):
            for rows, pathway in zip(module.rows, pathways, strict=True):
                target[f"{name}.weight"][list(rows)] = pathway[f"{name}.weight"]
            routed.add(f"{name}.weight")
        elif isinstance(module, RoutedMLP):
            layout = model.expert_layouts[module.layer]
            expand, reduce = (
                [source[f"{name}.{layer}.{what}"] for what in ("weight", "bias")] for layer in ("expand", "reduce")
            )
            for expert, (own, out) in enumerate(zip(module.expand.rows, module.reduce.rows, strict=True)):
                every = layout.channels(expert) if initial.model.kind == "dense" else range(layout.size)
                units = [unit % len(expand[1]) for unit in every]
                for what, values in zip(("weight", "bias"), expand, strict=True):
                    target[f"{name}.expand.{what}"][list(own)] = values[units]
                target[f"{name}.reduce.weight"][list(out)] = reduce[0][:, units]
                target[f"{name}.reduce.bias"][list(out)] = reduce[1]
            routed |= {f"{name}.{layer}.{what}" for layer in ("expand", "reduce") for what in ("weight", "bias")}
        elif isinstance(module, MLP):  # a block of ViT that is not routed; of a Dense's hidden units it has the first
            hidden = module.expand.out_features
            for what in ("weight", "bias"):
                source[f"{name}.expand.{what}"] = source[f"{name}.expand.{what}"][:hidden]
            source[f"{name}.reduce.weight"] = source[f"{name}.reduce.weight"][:, :hidden]
    plain = {name: value for name, value in source.items() if name in target and name not in routed}
    model.load_state_dict(target | plain)


def _check_slots(model: RoutedNetwork) -> None:
    """Check that every filter has one slot, the same in all of its experts, so that it can be a copy of one filter."""
    config = model.config
    if any(slot >= len(layer.rows[0]) for layer in expert_layers(model) for slot in slot_of_row(layer.rows)):
        raise ConfigError(
            f"the experts of N = {config.num_experts} and r = {config.model_scale:g} share filters in different places "
            "of their outputs, so they cannot all start as one copy; use expert_filters separate, or a smaller r",
            "init",
        )


def _check_disjoint(model: RoutedNetwork) -> None:
    config = model.config
    for layout in model.expert_layouts:
        owned = [channel for expert in range(layout.num_experts) for channel in layout.channels(expert)]
        if len({*owned} & {*range(layout.num_channels)}) < len(owned):
            raise ConfigError(
                f"upcycling windows needs experts that divide the channels of a Dense; the {config.num_experts} "
                f"experts of a layer with {layout.num_channels} channels own {len(owned)} in all, at r = "
                f"{config.model_scale:g}; use a smaller r without shared channels, or copies",
                "upcycling",
            )


def _mean(values: list[Tensor]) -> Tensor:
    """Mean of equally shaped tensors; the first one where they are equal or count something."""
    first = values[0]
    if not first.is_floating_point() or all(torch.equal(first, value) for value in values):
        return first
    return torch.stack(values).mean(dim=0)


@torch.no_grad()
def _cut_down(model: RoutedNetwork, dense: RoutedNetwork, expert: int | None = None) -> dict[str, Tensor]:
    """The weights of a Dense that has been cut down to the size of one pathway: to an expert's
    windows of channels in the layers that have experts, and else to the largest channels.
    """
    with seeded(0):
        network = build_model(dataclasses.replace(_without_experts(model.config), kind="sparse_cnn"))
    network.load_state_dict(network.state_dict() | dense.state_dict())
    close_masks(network)
    if expert is not None:
        for layout, place in zip(model.expert_layouts, model.routed_places, strict=True):
            (mask,) = network.routable[place].masks
            assert isinstance(mask, ChannelMask)
            mask.scores.zero_()
            mask.scores[list(layout.channels(expert))] = 1.0
    return compact(network).state_dict()


@torch.no_grad()
def _draw_anew(model: RoutedNetwork, share: float, generator: torch.Generator) -> None:
    """Draw a share of the rows of each expert's bank at random. Rows that all experts have are kept."""
    for layer in expert_layers(model):
        of_some = rows_of_some(layer.rows)
        for bank in layer.parameters(recurse=False) if of_some else ():
            own = torch.tensor([row in of_some for row in range(len(bank))], device=bank.device)
            chosen = own & (torch.rand(len(bank), generator=generator).to(bank.device) < share)
            drawn = torch.randn(bank.shape, generator=generator).to(bank.device) * bank.std() + bank.mean()
            bank[chosen] = drawn[chosen]
