"""Experts that grow apart from one common filter bank.

Each of the N experts of a layer sees a share of the images, and the next layer reads the same slots
for all experts. Trained independently, experts give the same slot different meanings, so the next
layer's input changes with every routing decision, and all layers learn slowly (docs/log.md). The N
filters of a slot therefore start equal, and the gradient G_e of expert e's filter is replaced by

    G + specialization * (G_e - G / N),    G = sum over experts.

The mean of the experts' filters moves by G: it learns from every image, exactly as S-Dense's
filters do. The differences between experts move `specialization` times as fast as under plain SGD.
At 0 the network stays S-Dense; for N = 1 it is S-Dense at any value. Under SGD with momentum and
weight decay, this equals the training of shared plus specific filters. The filters stay one plain
bank, so nothing has to be merged, saved or exported differently.

If windows overlap (N * r > 1), a filter of several experts counts once in its slot. N in the
formula is then the number of different filters in a slot. At r = 1 it is 1 everywhere, which gives
Dense's plain SGD. For N > 2, some filters have different slots in different experts; they are not
coupled.

Shape suffixes: F filters of a bank, S slots of an expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

from advmoe.models.modes import submodules
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.moe_linear import MoELinear
from advmoe.models.rows import Rows


def slot_of_row(rows: Rows) -> tuple[int, ...]:
    """The slot of each row of a bank, in any of its experts. A row whose slot differs between
    experts gets its own number.

    Args:
        rows: Rows of each expert, in the order of its slots; all rows of the bank are in some
            expert.
    """
    slots: dict[int, set[int]] = {}
    for own in rows:
        for slot, row in enumerate(own):
            slots.setdefault(row, set()).add(slot)
    size = len(rows[0])
    return tuple(min(slots[row]) if len(slots[row]) == 1 else size + row for row in range(len(slots)))


def rows_of_some(rows: Rows) -> set[int]:
    """Rows of a bank that some expert has and another one lacks."""
    return set(chain.from_iterable(rows)) - set(rows[0]).intersection(*rows)


@dataclass(frozen=True, eq=False)
class Slots:
    """The assignment of a bank's rows to slots."""

    slot_of_F: Tensor
    """int64 [bank], the slot of each row."""
    count_S: Tensor
    """Number of rows of each slot, at least 1."""
    copies: int | None
    """N if row i fills slot i % (bank / N): experts are consecutive and share no row."""

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device | None = None) -> Slots:
        """Make a `Slots` from the slot of each row."""
        slot_of_F = torch.tensor(slots, device=device)
        size = max(slots) + 1
        tiled = list(slots) == [row % size for row in range(len(slots))] and len(slots) % size == 0
        count_of = Counter(slots)  # read here, because the host would wait for a device
        count_S = torch.tensor([max(1, count_of[slot]) for slot in range(size)], device=device)
        return cls(slot_of_F, count_S, len(slots) // size if tiled else None)


@lru_cache(maxsize=256)
def _shared_slots(rows: Rows, device: torch.device) -> Slots | None:
    """The slots of a bank on a device, cached between steps; None if every slot has one filter only."""
    slots = slot_of_row(rows)
    return Slots.of(slots, device) if len(set(slots)) < len(slots) else None


def expert_layers(model: nn.Module) -> Iterator[MoEConv2d | MoELinear]:
    """Layers whose filters are divided among experts."""
    for module in submodules(model):
        if isinstance(module, MoEConv2d | MoELinear):
            yield module


def expert_banks(model: nn.Module) -> Iterator[tuple[nn.Parameter, Slots]]:
    """Weight banks in which some slot has several filters, and their slots."""
    for layer in expert_layers(model):
        slots = _shared_slots(layer.rows, layer.weight.device)
        if slots is not None:
            for bank in layer.parameters(recurse=False):
                yield bank, slots


@torch.no_grad()
def start_equal(model: nn.Module) -> None:
    """Give all filters of a slot the values of the first one."""
    for weight, slots in expert_banks(model):
        first_of: dict[int, int] = {}
        first = [first_of.setdefault(slot, row) for row, slot in enumerate(slots.slot_of_F.tolist())]
        weight.copy_(weight[first])


@torch.no_grad()
def couple_gradients(banks: Iterable[tuple[nn.Parameter, Slots]], specialization: float) -> None:
    """Replace the gradients of expert banks by coupled gradients, in place. Banks without a gradient are skipped."""
    for weight, slots in banks:
        if weight.grad is not None:
            couple(weight.grad, slots, specialization)


def couple(gradient: Tensor, slots: Slots, specialization: float) -> None:
    """Apply the formula above in place to the gradient [R, ...] of a bank."""
    if slots.copies is not None:
        of_expert = gradient.unflatten(0, (slots.copies, -1))
        total = of_expert.sum(dim=0)
        of_expert.mul_(specialization).add_(total, alpha=1.0 - specialization / slots.copies)
        return
    count = slots.count_S.reshape(-1, *[1] * (gradient.ndim - 1))
    total = gradient.new_zeros(len(count), *gradient.shape[1:]).index_add_(0, slots.slot_of_F, gradient)
    common = total - specialization * (total / count)
    gradient.mul_(specialization).add_(common.index_select(0, slots.slot_of_F))
