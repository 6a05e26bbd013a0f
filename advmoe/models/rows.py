"""The rows of a weight bank that make up each expert's filters, and how the experts differ in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Rows = tuple[tuple[int, ...], ...]
"""Rows of a weight bank that belong to each expert, in the order of its output slots. All experts have equally many."""


def _stretches(rows: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the stretches of neighboring rows that make up a list of rows, in its order."""
    starts = [place for place in range(len(rows)) if place == 0 or rows[place] != rows[place - 1] + 1]
    stops = [*starts[1:], len(rows)]
    return tuple((rows[start], rows[stop - 1] + 1) for start, stop in zip(starts, stops, strict=True))


_known_stretches = lru_cache(maxsize=1024)(_stretches)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler would trace through it, row by row
def stretches(rows: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """`_stretches` with a cache. A compiler traces through it without the cache."""
    return _known_stretches(rows)


def expert_rows(bank: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The rows of a weight bank that an expert owns, in the order of its slots. Consecutive rows are not copied."""
    parts = [bank[start:stop] for start, stop in stretches(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_rows(rows: Sequence[int], size: int) -> Rows:
    """The rows of each expert, from all of them in one list."""
    return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))


class Slots(NamedTuple):
    """Neighboring slots in which the same experts have other rows than the first expert."""

    start: int
    stop: int
    experts: tuple[int, ...]
    """The experts that have the other rows. The remaining ones have those of the first expert, or rows of another
    `Exchange`."""

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.stop - self.start


class Exchange(NamedTuple):
    """Other rows for some slots of the first expert, one for each of these slots."""

    rows: tuple[int, ...]
    """The other rows, in the order of their slots."""
    instead_of: tuple[int, ...]
    """The first expert's rows in these slots."""
    slots: tuple[Slots, ...]
    """The slots, increasing."""


@lru_cache(maxsize=1024)
def exchanges(rows: Rows) -> tuple[Exchange, ...]:
    """What makes the first expert into each other expert.

    A slot in which k experts have different rows is in k - 1 exchanges. Experts of 2 S rows with S
    slots, in which each row has one slot, therefore need one exchange, however many there are.
    """
    found: list[dict[int, int]] = []  # of each exchange: the row of each slot
    for slot, first in enumerate(rows[0]):
        others = dict.fromkeys(own[slot] for own in rows if own[slot] != first)
        for number, row in enumerate(others):
            if number == len(found):
                found.append({})
            found[number][slot] = row
    return tuple(_exchange(rows, row_of_slot) for row_of_slot in found)


def _exchange(rows: Rows, row_of_slot: dict[int, int]) -> Exchange:
    slots: list[Slots] = []
    for slot, row in row_of_slot.items():
        experts = tuple(expert for expert, own in enumerate(rows) if own[slot] == row)
        if slots and slots[-1].stop == slot and slots[-1].experts == experts:
            slots[-1] = slots[-1]._replace(stop=slot + 1)
        else:
            slots.append(Slots(slot, slot + 1, experts))
    return Exchange(tuple(row_of_slot.values()), tuple(rows[0][slot] for slot in row_of_slot), tuple(slots))


class Share(NamedTuple):
    """Neighboring rows that the same experts have, in the same neighboring slots."""

    start: int
    stop: int
    slot: int
    """The slot of the first row."""
    experts: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.stop)

    @property
    def slots(self) -> slice:
        """The slots of the rows."""
        return slice(self.slot, self.slot + self.stop - self.start)


@lru_cache(maxsize=1024)
def shares(rows: Rows) -> tuple[Share, ...]:
    """All experts' rows, each one once for each slot that it has in some expert."""
    owners: dict[tuple[int, int], list[int]] = {}
    for expert, own in enumerate(rows):
        for slot, row in enumerate(own):
            owners.setdefault((row, slot), []).append(expert)
    found: list[Share] = []
    for (row, slot), experts in sorted(owners.items()):
        last = found[-1] if found else None
        if last and last.stop == row and last.slots.stop == slot and last.experts == tuple(experts):
            found[-1] = last._replace(stop=row + 1)
        else:
            found.append(Share(row, row + 1, slot, tuple(experts)))
    return tuple(found)
