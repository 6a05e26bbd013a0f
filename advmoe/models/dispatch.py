"""Dispatch and combine: each image is computed by its own expert and returns to its place in the batch.

Images are sorted by expert, each expert computes its part of the sorted batch, and the results
return to batch order. The backward pass uses the inverse permutation. Autograd would use a scatter
that fills with zeros and accumulates.

The signal from which a router learns is computed here too, in the backward pass only
(`router_signal`). It is the first-order change of the loss if the layer's output moved toward
another expert's output.

Shape suffixes: B batch (images, or tokens where those are routed), N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from advmoe.config import Dispatch
from advmoe.models.first_order import first_order
from advmoe.models.routing import Decision, Signal

PIECES = 1024
"""Up to this many pieces are joined into a batch by one copy on the CPU. More pieces take an index and two copies."""


class Experts(Protocol):
    """The experts of one layer."""

    @property
    def num_experts(self) -> int:
        """N."""

    @property
    def comparison_pays(self) -> bool:
        """Whether `along_all` costs no more than the output of one expert other than the chosen one."""

    def output(self, expert: int, part: Tensor) -> Tensor:
        """Output of one expert for rows [b, ...]."""

    def along_all(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Compute <gradient_b, y_e> for each row b and each expert e, [B, N], but for a constant of each row."""

    def along_advantage(self, order: Order, x: Tensor, gradient: Tensor) -> Tensor:
        """<gradient_b, y_c - mean of all y_e> for each row b of a sorted batch, c being its own expert; [B]."""


@dataclass(frozen=True, eq=False)
class Order:
    """The images of a batch sorted by expert, and the way back."""

    expert_index_B: Tensor
    order_B: Tensor
    """int64: the image at each place of the sorted batch."""
    present: tuple[int, ...]
    """Experts that have images, increasing; expert 0 alone for an empty batch."""
    counts: tuple[int, ...]
    """Number of images of each of them."""

    @classmethod
    def of(cls, expert_index_B: Tensor, num_experts: int) -> Order:
        """The order of a batch. On a GPU the host waits for the device, because it has to know the counts."""
        if expert_index_B.is_cuda:  # where bincount waits twice more, for the least and the largest number
            experts_N = torch.arange(num_experts, device=expert_index_B.device)
            counts = (expert_index_B[:, None] == experts_N).sum(dim=0).tolist()
        else:
            counts = torch.bincount(expert_index_B, minlength=num_experts).tolist()
        present = tuple(expert for expert, count in enumerate(counts) if count) or (0,)
        order_B = expert_index_B if len(present) == 1 else expert_index_B.argsort(stable=True)
        return cls(expert_index_B, order_B, present, tuple(counts[expert] for expert in present))

    def members(self, like: Tensor) -> Tensor:
        """Which images of the sorted batch each present expert has, 1 or 0, [present, B], of a tensor's type."""
        ones: Tensor = torch.block_diag(*[like.new_ones(1, count) for count in self.counts])
        return ones

    @property
    def alone(self) -> bool:
        """Whether one expert has all images, so that no image moves."""
        return len(self.present) == 1

    def sort(self, x: Tensor) -> Tensor:
        """Rows of a tensor [B, ...] in the order of their experts."""
        if self.alone:
            return x
        if is_channels_last(x):
            return x.permute(0, 2, 3, 1).index_select(0, self.order_B).permute(0, 3, 1, 2)
        return x.index_select(0, self.order_B)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The parts of a sorted tensor, one for each expert that is present."""
        return (x,) if self.alone else x.split(self.counts)

    def stretches(self, experts: Sequence[int]) -> list[slice]:
        """Where the images of some experts, in increasing order, are in the sorted batch. Neighbors are one stretch."""
        found: list[slice] = []
        start = 0
        for expert, count in zip(self.present, self.counts, strict=True):
            if expert in experts and count:
                first = found.pop().start if found and found[-1].stop == start else start
                found.append(slice(first, start + count))
            start += count
        return found

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """From the parts of the present experts to a tensor [B, ...] in batch order."""
        if self.alone:
            return parts[0]
        if all(is_channels_last(part) for part in parts):
            return self._combine([part.permute(0, 2, 3, 1) for part in parts]).permute(0, 3, 1, 2)
        return self._combine(parts)

    def _combine(self, parts: Sequence[Tensor]) -> Tensor:
        if parts[0].is_cpu and len(self._runs[0]) <= PIECES:
            owners, sizes = self._runs
            pieces = {e: iter(part.split(sizes[e])) for e, part in zip(self.present, parts, strict=True)}
            return torch.cat([next(pieces[owner]) for owner in owners])
        inverse_B = torch.empty_like(self.order_B)
        inverse_B[self.order_B] = torch.arange(len(self.order_B), device=self.order_B.device)
        return torch.cat(list(parts)).index_select(0, inverse_B)

    @cached_property
    def _runs(self) -> tuple[list[int], dict[int, list[int]]]:
        """The expert of each run of consecutive images with one expert, and the lengths of each expert's runs.

        Consecutive images of one expert are consecutive in the expert's part, too.
        """
        experts, lengths = torch.unique_consecutive(self.expert_index_B, return_counts=True)
        owners: list[int] = experts.tolist()
        sizes: dict[int, list[int]] = {expert: [] for expert in self.present}
        for owner, length in zip(owners, lengths.tolist(), strict=True):
            sizes[owner].append(length)
        return owners, sizes


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory order is channels-last, or does not matter."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return order.sort(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.order.combine(ctx.order.split(gradient)), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Order, *parts: Tensor) -> Tensor:
        ctx.order = order
        return order.combine(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.order.split(ctx.order.sort(gradient))


def dispatch(x: Tensor, order: Order, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Apply `compute(expert, sub_batch)` to the images of each expert that has any, and combine in batch order."""
    if order.alone:  # also an empty batch, whose shape an expert knows
        return compute(order.present[0], x)
    parts = order.split(_Sort.apply(x, order))
    y: Tensor = _Combine.apply(
        order, *[compute(expert, part) for expert, part in zip(order.present, parts, strict=True)]
    )
    return y


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of a [B, ...] with the same row of b, [B]."""
    if is_channels_last(a):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).reshape(len(a))


def router_signal(
    decision: Decision, experts: Experts, order: Order, x: Tensor, y_B: Tensor | None, gradient: Tensor
) -> Tensor:
    """The gradient of a decision's gate, from that of the layer's output (`advmoe.models.routing.Decision`).

    Args:
        decision: The layer's decision, which names the signal.
        experts: Experts of the layer.
        order: Order of the batch.
        x: The layer's input [B, ...], sorted.
        y_B: Inner products of the layer's output and its gradient, in batch order, where
            `uses_output`.
        gradient: Gradient of the loss by the layer's output [B, ...], sorted.

    Returns:
        [B] for `own` and `mean`, [B, N] for `all` and `sampled`, in batch order.
    """
    if decision.signal == "own":
        assert y_B is not None
        return y_B
    number, chosen_B1 = experts.num_experts, decision.expert_index_B[:, None]
    if decision.signal == "all" or experts.comparison_pays:
        return signal_of_values(decision, order.combine(order.split(experts.along_all(x, gradient))))
    if decision.signal == "mean":
        return order.combine(order.split(experts.along_advantage(order, x, gradient)))
    assert y_B is not None
    assert decision.other_B is not None
    others = Order.of(order.sort(decision.other_B), number)
    parts = zip(others.present, others.split(others.sort(x)), others.split(others.sort(gradient)), strict=True)
    other_B = others.combine([row_products(g, experts.output(expert, part)) for expert, part, g in parts])
    difference_B = order.combine(order.split(other_B)) - y_B
    signal_BN = gradient.new_zeros(len(gradient), number).scatter(1, decision.other_B[:, None], difference_B[:, None])
    return signal_BN.scatter(1, chosen_B1, 0.0)


def signal_of_values(decision: Decision, value_BN: Tensor) -> Tensor:
    """`router_signal` but for `own`, from <gradient_b, y_e> for all experts, but for a constant of each row."""
    more_BN = value_BN - value_BN.gather(1, decision.expert_index_B[:, None])
    if decision.signal == "mean":
        return -more_BN.mean(dim=1)
    if decision.signal == "all":
        return more_BN
    assert decision.other_B is not None
    other_B1 = decision.other_B[:, None]
    return torch.zeros_like(more_BN).scatter(1, other_B1, more_BN.gather(1, other_B1))


def uses_output(signal: Signal, experts: Experts) -> bool:
    """Whether `router_signal` needs the products of the layer's output and its gradient."""
    return signal == "own" or (signal == "sampled" and not experts.comparison_pays)


class _Gate(torch.autograd.Function):
    """The output as it is; in the backward pass, the gate's gradient too."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, x: Tensor, order: Order, decision: Decision, experts: Experts
    ) -> Tensor:
        ctx.decision, ctx.experts, ctx.order = decision._replace(logits_BN=None, gate=None), experts, order
        ctx.kind, ctx.autocast = gate.dtype, dtype_of_autocast(x.device.type)
        ctx.save_for_backward(x, y if uses_output(decision.signal, experts) else None)
        return y.view_as(y)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        order, products_B = ctx.order, None if y is None else row_products(gradient, y)
        # experts are computed as in the forward pass, which autocast leaves before the backward pass
        with nullcontext() if ctx.autocast is None else torch.autocast(x.device.type, ctx.autocast):
            of_gate = router_signal(ctx.decision, ctx.experts, order, order.sort(x), products_B, order.sort(gradient))
        return gradient, of_gate.to(ctx.kind), None, None, None, None


AUTOCAST = {"cpu", "cuda"}
"""Types of the devices with autocast. Older compilers of torch cannot trace `torch.amp.is_autocast_available`."""


def dtype_of_autocast(device: str) -> torch.dtype | None:
    """The type in which autocast computes on a device, or None if there is no autocast."""
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def exporting() -> bool:
    """Whether `torch.export` records the network. In older versions, compilers say so too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def route(x: Tensor, decision: Decision, experts: Experts) -> Tensor:
    """Each row's output by its own expert, with the router's gradient attached.

    If a graph must not depend on the data (`computes_all`), all experts are computed and one is
    selected.
    """
    if decision.alone is not None and x.is_cuda:
        return experts.output(decision.alone, x)
    if computes_all(x, experts.num_experts):
        return select([experts.output(expert, x) for expert in range(experts.num_experts)], decision)
    order = Order.of(decision.expert_index_B, experts.num_experts)
    y = dispatch(x, order, experts.output)
    if decision.gate is None:
        return y
    gated: Tensor = _Gate.apply(y, decision.gate, x.detach(), order, decision, experts)
    return gated


def computes_all(x: Tensor, num_experts: int) -> bool:
    """Whether all experts are computed and one is selected, instead of sorting the images by expert.

    A compiled graph requires it. On a GPU, two experts cost less than the host's wait for the
    counts.
    """
    return torch.compiler.is_compiling() or (x.is_cuda and num_experts <= 2)


_tiles = False


@contextmanager
def computing(way: Dispatch) -> Iterator[None]:
    """Inside, MoE convolutions bring images and experts together in this way."""
    global _tiles
    before, _tiles = _tiles, way == "tiles"
    try:
        yield
    finally:
        _tiles = before


def uses_tiles() -> bool:
    """Whether convolutions look up the expert of each tile of an image (`advmoe.models.tiles`)."""
    return _tiles


def select(outputs: Sequence[Tensor], decision: Decision) -> Tensor:
    """Selects the chosen expert's output from all outputs, each [B, ...]. Value and gradients equal
    those of `route`.
    """
    y = _pick(outputs, decision.expert_index_B)
    if decision.gate is None:
        return y
    change = (decision.gate - decision.gate.detach()).to(y.dtype)
    if decision.signal == "own":
        terms = [(change, y)]
    elif decision.signal == "mean":
        with torch.no_grad():
            terms = [(change, y - torch.stack(list(outputs)).mean(dim=0))]
    elif decision.signal == "all":
        terms = list(zip(change.unbind(1), [output - y for output in outputs], strict=True))
    else:
        assert decision.other_B is not None
        terms = [(change.gather(1, decision.other_B[:, None]), _pick(outputs, decision.other_B) - y)]
    for factor, output in terms:
        y = y + factor.reshape(-1, *(1,) * (y.ndim - 1)) * output.detach()
    return y


def _pick(outputs: Sequence[Tensor], index_B: Tensor) -> Tensor:
    """outputs[index_B[b]][b] for each b, exactly, even where another output is not finite."""
    shape = (-1, *(1,) * (outputs[0].ndim - 1))
    if outputs[0].is_cpu and torch.compiler.is_compiling():
        # torch 2.15's compiler computes wrong statistics of `where` on CPUs, unless the channels are
        # a multiple of 16 (docs/log.md)
        every = torch.stack(list(outputs), dim=1)
        return every.take_along_dim(index_B.reshape(-1, 1, *shape[1:]), dim=1).squeeze(1)
    y = outputs[0]
    for expert, output in enumerate(outputs[1:], start=1):
        y = torch.where((index_B == expert).reshape(shape), output, y)
    return y
