"""Experts that grow apart from one common filter bank.

N experts of a layer each see a share of the images, and the next layer reads the same slots whichever of them wrote.
Left to themselves they agree on nothing: a slot means something else after every decision, and all learn slowly
(docs/log.md). So the N filters of a slot start equal, and the gradient G_e of expert e's becomes

    G + specialisation * (G_e - G / N),    G = sum over experts.

What the experts have in common, their mean, moves by G: it learns from every image, exactly as S-Dense's filters do.
What tells them apart moves `specialisation` times as fast as under plain SGD. At 0 the network stays S-Dense; with
N = 1 it is S-Dense at any value. Under SGD with momentum and weight decay this equals the training of shared plus
specific filters, but the filters stay one plain bank: nothing has to be merged, saved or exported differently.

Where windows overlap (N * r > 1), a filter of several experts stands for all of them in its slot: the formula's N is
then the number of different filters in a slot, and at r = 1, where that is 1 everywhere, it is Dense's plain SGD. A
filter that changes slots from expert to expert, as some must if N > 2, has no counterparts and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from advmoe.models.moe_conv import MoEConv2d, Rows
from advmoe.models.moe_linear import MoELinear


def slot_of_row(rows: Rows) -> tuple[int, ...]:
    """For each row of a bank the slot it fills, in whichever expert; a row that changes slots gets a number of its own.

    Args:
        rows: rows of each expert, in the order of its slots; all rows of the bank are in some expert.
    """
    slots: dict[int, set[int]] = {}
    for own in rows:
        for slot, row in enumerate(own):
            slots.setdefault(row, set()).add(slot)
    size = len(rows[0])
    return tuple(min(slots[row]) if len(slots[row]) == 1 else size + row for row in range(len(slots)))


@lru_cache(maxsize=256)
def _shared_slots(rows: Rows, device: torch.device) -> Tensor | None:
    """`slot_of_row` on a device, made once and not in every step; None if every slot has one filter only."""
    slots = slot_of_row(rows)
    return torch.tensor(slots, device=device) if len(set(slots)) < len(slots) else None


def expert_banks(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Weight banks in which some slot has several filters, and the slot of each row, int64 [bank]."""
    for module in model.modules():
        if isinstance(module, MoEConv2d | MoELinear):
            slots_R = _shared_slots(module.rows, module.weight.device)
            if slots_R is not None:
                for bank in module.parameters():
                    yield bank, slots_R


@torch.no_grad()
def start_equal(model: nn.Module) -> None:
    """Give all filters of a slot the values of the first one."""
    for weight, slots_R in expert_banks(model):
        slots, positions_R = slots_R.unique(return_inverse=True)
        rows_R = torch.arange(len(weight), device=weight.device)
        first = torch.full_like(slots, len(weight)).scatter_reduce(0, positions_R, rows_R, "amin")
        weight.copy_(weight[first[positions_R]])


@torch.no_grad()
def couple_gradients(model: nn.Module, specialisation: float) -> None:
    """Replace the experts' gradients by the coupled ones, in place; banks without a gradient are left alone."""
    for weight, slots_R in expert_banks(model):
        if weight.grad is not None:
            weight.grad.copy_(coupled(weight.grad, slots_R, specialisation))


def coupled(gradient: Tensor, slots_R: Tensor, specialisation: float) -> Tensor:
    """The formula above for the gradient [R, ...] of a bank whose row i fills slot slots_R[i]."""
    count = torch.bincount(slots_R).clamp(min=1).reshape(-1, *[1] * (gradient.ndim - 1))
    total = gradient.new_zeros(len(count), *gradient.shape[1:]).index_add_(0, slots_R, gradient)
    return total[slots_R] + specialisation * (gradient - (total / count)[slots_R])
