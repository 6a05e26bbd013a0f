"""Routing: which expert each image takes in each MoE layer, as plain values.

An MoE layer is a router plus one convolution (paper, Sec. 3). The router picks one of N experts per image; the picks of
all layers are the image's *pathway*. Nothing here is stored on a module: a forward pass opens a `RoutingTape`, each
layer asks it for its decision, and the tape is read out as a `Routing` at the end.

Shape suffixes: B batch, C channels, H height, W width, N experts, L MoE layers, R routers (R <= L, several layers may
share one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advmoe.errors import ConfigError


def scaled_channels(num_channels: int, model_scale: float) -> int:
    """Channels of one expert, r * C rounded to the nearest integer.

    The one place where r becomes a width: an expert and the S-Dense layer it is compared with always agree.

    Raises:
        ConfigError: r is outside (0, 1], or leaves no channel.
    """
    if not 0.0 < model_scale <= 1.0:
        raise ConfigError(f"model scale r must be in (0, 1], got {model_scale:g}; the paper's default is 0.5")
    size = int(model_scale * num_channels + 0.5)
    if size < 1:
        least = 0.5 / num_channels
        raise ConfigError(
            f"model scale r = {model_scale:g} leaves no channel of a layer with {num_channels}; "
            f"use r >= {least:.3g} or a larger width"
        )
    return size


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """Which channels of a layer each expert owns.

    Expert i takes the circular window of r * C channels that starts at round(i * C / N): disjoint for N * r <= 1,
    overlapping above. `separate` gives every expert filters of its own instead, as the authors' released code does; at
    N = 2, r = 0.5 the two agree.

    An expert's output is packed: it fills r * C slots, which the next layer reads whoever wrote them. A channel of
    several experts sits in the same slot in all of them, so that at r = 1 every pathway is the full backbone (paper,
    Sec. 5), whatever N. With N > 2 windows around a circle there is not always such an order; then some
    channels change slots.
    """

    num_channels: int
    num_experts: int
    model_scale: float
    separate: bool = False

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"the number of experts N must be at least 1, got {self.num_experts}")
        scaled_channels(self.num_channels, self.model_scale)

    @property
    def size(self) -> int:
        """Channels of one expert."""
        return scaled_channels(self.num_channels, self.model_scale)

    def channels(self, expert: int) -> tuple[int, ...]:
        """Backbone channels of one expert, in the order of its output slots."""
        return self._slots[expert]

    @cached_property
    def _slots(self) -> tuple[tuple[int, ...], ...]:
        """Channel in each slot of each expert: those with a slot by an earlier expert first, the others in the gaps."""
        home: dict[int, int] = {}
        slots: list[tuple[int, ...]] = []
        for expert in range(self.num_experts):
            taken: dict[int, int] = {}
            others: list[int] = []
            for channel in self._window(expert):
                slot = home.get(channel)
                if slot is None or slot in taken:
                    others.append(channel)
                else:
                    taken[slot] = channel
            gaps = [slot for slot in range(self.size) if slot not in taken]
            taken |= dict(zip(gaps, others, strict=True))
            for slot, channel in taken.items():
                home.setdefault(channel, slot)
            slots.append(tuple(taken[slot] for slot in range(self.size)))
        return tuple(slots)

    def _window(self, expert: int) -> Iterator[int]:
        """Backbone channels of one expert, from the start of its window on."""
        if self.separate:
            return iter(range(expert * self.size, (expert + 1) * self.size))
        start = int(expert * self.num_channels / self.num_experts + 0.5)
        return ((start + step) % self.num_channels for step in range(self.size))

    @property
    def disjoint(self) -> bool:
        """Whether no channel belongs to two experts, so that the weight bank splits evenly among them."""
        return len(self.bank_channels) == self.num_experts * self.size

    @property
    def bank_channels(self) -> tuple[int, ...]:
        """Backbone channels that some expert owns, sorted: the rows of the weight bank. The others have no weights."""
        return tuple(sorted({channel for expert in range(self.num_experts) for channel in self.channels(expert)}))

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Row of the weight bank behind each slot of each expert."""
        row_of = {channel: row for row, channel in enumerate(self.bank_channels)}
        return tuple(tuple(row_of[channel] for channel in channels) for channels in self._slots)


class Decision(NamedTuple):
    """What one router decided for a batch.

    `gate_B` is exactly 1 in value; it only carries the router's gradient, and is None where none is wanted.
    """

    expert_index_B: Tensor
    logits_BN: Tensor | None
    gate_B: Tensor | None
    against_mean: bool = False
    """The gate multiplies what sets the chosen expert apart from the mean one, not its whole output."""


class Routing(NamedTuple):
    """The pathways of a batch: `expert_index_BL` int64 in [0, N), and the routers' logits (None if forced)."""

    expert_index_BL: Tensor
    logits_BRN: Tensor | None


def gate(logits_BN: Tensor, expert_index_B: Tensor, router_gradient: str) -> Tensor:
    """A factor of value 1 that lets gradients through the argmax.

    `softmax` and `advantage`: p_e / stopgrad(p_e), whose gradient reaches all logits; they differ in what the gate
    multiplies (`pass_gate`). `straight_through`: 1 + logit_e - stopgrad(logit_e), the gradient reaches the chosen logit
    only (as in the authors' released code). The softmax form is evaluated in log space, where nothing underflows.
    """
    score_BN = logits_BN if router_gradient == "straight_through" else logits_BN.log_softmax(dim=1)
    score_B = score_BN.gather(1, expert_index_B.unsqueeze(1)).squeeze(1)
    difference_B = score_B - score_B.detach()
    return 1.0 + difference_B if router_gradient == "straight_through" else difference_B.exp()


def pass_gate(y: Tensor, decision: Decision, mean: Callable[[], Tensor]) -> Tensor:
    """The chosen experts' output y [B, ...] unchanged, with the router's gradient attached.

    A gate on the whole output learns whether the loss wants the output scaled, which no choice of expert can answer. A
    gate on the distance from `mean()`, the mean of all experts' outputs, learns how the loss changes along it; for
    N = 2 it is half the way from the other expert. That costs one more forward convolution while routers learn.
    """
    if decision.gate_B is None:
        return y
    gate = decision.gate_B.reshape(-1, *[1] * (y.ndim - 1))
    if not decision.against_mean:
        return y * gate
    with torch.no_grad():
        advantage = y - mean()
    return y + (gate - 1.0) * advantage


class Centring(nn.BatchNorm1d):
    """Standardises features by running statistics, in training too, so that a decision depends on the image alone.

    On the same features the training attack, the update that follows it and the finished model therefore decide alike.
    By batch statistics a router would, in training, not even see a shift that the attack gives to all images.
    """

    NEWEST = 0.1
    """Weight of the newest batch, after the first 1 / NEWEST batches, which count alike."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)

    def forward(self, features_BC: Tensor) -> Tensor:
        """[B, C] -> [B, C] by the stored statistics, which in training mode take in the batch afterwards."""
        if not self.training:
            return super().forward(features_BC)
        assert self.running_mean is not None
        assert self.running_var is not None
        standardised_BC = (features_BC - self.running_mean) * (self.running_var + self.eps).rsqrt()
        assert self.num_batches_tracked is not None
        self.momentum = None if self.num_batches_tracked < 1.0 / self.NEWEST else self.NEWEST
        super().forward(features_BC.detach())
        return standardised_BC


class Router(nn.Module):
    """Global average pool -> centring -> linear without bias -> N logits.

    The pooled features of a ReLU network are positive and share one large direction, so that a plain linear router
    sends every image to the same expert within a few epochs. Centring takes that direction out; as there is no bias,
    every logit then has mean zero over the data, and no expert can win everywhere.
    """

    def __init__(self, in_channels: int, num_experts: int, *, router_gradient: str = "advantage") -> None:
        super().__init__()
        self.router_gradient = router_gradient
        self.centre = Centring(in_channels)
        self.linear = nn.Linear(in_channels, num_experts, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, N] for the layer input."""
        logits: Tensor = self.linear(self.centre(x_BCHW.mean(dim=(2, 3))))
        return logits

    def decide(self, x_BCHW: Tensor) -> Decision:
        """The expert of each image (first of equal logits), with a gate where this router is being trained."""
        logits_BN = self(x_BCHW)
        expert_index_B = logits_BN.argmax(dim=1)
        learns = self.training and logits_BN.requires_grad and not torch.compiler.is_exporting()
        gate_B = gate(logits_BN, expert_index_B, self.router_gradient) if learns else None
        return Decision(expert_index_B, logits_BN, gate_B, against_mean=self.router_gradient == "advantage")


class ImageRouter(Router):
    """A small CNN on the normalised image that decides for the whole network (the released code's granularity)."""

    def __init__(self, num_experts: int, *, router_gradient: str = "advantage") -> None:
        super().__init__(64, num_experts, router_gradient=router_gradient)
        self.features = nn.Sequential()
        for in_channels, out_channels in ((3, 16), (16, 32), (32, 64)):
            self.features.extend(
                (
                    nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                )
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, N] for images [B, 3, H, W]."""
        return super().forward(self.features(x_BCHW))


class RoutingTape:
    """Collects the routing decisions of one forward pass, or replays a given pathway.

    Args:
        routers: the network's routers.
        router_of_layer: index of the router that decides for each MoE layer; a router decides once, on the input of the
            first layer that asks.
        forced_BL: pathways to take instead of asking the routers, int64 [B, L].
    """

    def __init__(self, routers: nn.ModuleList, router_of_layer: Sequence[int], forced_BL: Tensor | None = None) -> None:
        self._routers = routers
        self._router_of_layer = router_of_layer
        self._forced_BL = forced_BL
        self._decisions: dict[int, Decision] = {}

    def decide(self, layer: int, x_BCHW: Tensor) -> Decision:
        """The decision for MoE layer number `layer`, whose input is x."""
        if self._forced_BL is not None:
            return Decision(self._forced_BL[:, layer], None, None)
        router = self._router_of_layer[layer]
        if router not in self._decisions:
            self._decisions[router] = self._routers[router].decide(self.seen(x_BCHW))  # type: ignore[operator]
        return self._decisions[router]

    def seen(self, x_BCHW: Tensor) -> Tensor:
        """What a router reads: the layer's input, as a constant.

        Routers learn from features and do not shape them. Away from its boundaries the argmax has derivative zero; what
        a gate would add to the gradient of the experts, or of an attack, is not a derivative of what is computed.
        """
        return x_BCHW.detach()

    def apply(self, layer: int, x_BCHW: Tensor, compute: Callable[[Tensor, Decision], Tensor]) -> Tensor:
        """Output of MoE layer number `layer`: decide, then `compute(input, decision)` with the experts decided for.

        A tape that routes differently (an attack's relaxation) overrides this or `decide`; layers stay as they are.
        """
        return compute(x_BCHW, self.decide(layer, x_BCHW))

    def read(self) -> Routing:
        """All decisions of the pass, once every layer has asked."""
        if self._forced_BL is not None:
            return Routing(self._forced_BL, None)
        decided = [self._decisions[router] for router in range(len(self._routers))]
        expert_index_BL = torch.stack([decided[router].expert_index_B for router in self._router_of_layer], dim=1)
        return Routing(expert_index_BL, torch.stack([d.logits_BN for d in decided if d.logits_BN is not None], dim=1))
