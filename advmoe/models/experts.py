"""Which channels of a layer each expert owns, and where its outputs lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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
    N = 2, r = 0.5 the two agree. What is `shared` comes first and is the same in all; the windows share out the rest.

    An expert's output is packed: it fills r * C slots, which the next layer reads whoever wrote them. A channel of
    several experts sits in the same slot in all of them, so that at r = 1 every pathway is the full backbone (paper,
    Sec. 5), whatever N. With N > 2 windows around a circle there is not always such an order; then some
    channels change slots.
    """

    num_channels: int
    num_experts: int
    model_scale: float
    separate: bool = False
    shared: float = 0.0
    """Share of every expert's filters that are the same ones: the layer's first channels, in the first slots."""

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"the number of experts N must be at least 1, got {self.num_experts}")
        scaled_channels(self.num_channels, self.model_scale)

    @property
    def size(self) -> int:
        """Channels of one expert."""
        return scaled_channels(self.num_channels, self.model_scale)

    @property
    def shared_size(self) -> int:
        """Channels that all experts have in common."""
        return int(self.shared * self.size + 0.5)

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
        common = self.shared_size
        own, rest = self.size - common, self.num_channels - common
        yield from range(common)
        start = expert * own if self.separate else int(expert * rest / self.num_experts + 0.5)
        for step in range(own):
            yield common + (start + step if self.separate else (start + step) % rest)

    @property
    def bank_channels(self) -> tuple[int, ...]:
        """Backbone channels that some expert owns, sorted: the rows of the weight bank. The others have no weights."""
        return tuple(sorted({channel for expert in range(self.num_experts) for channel in self.channels(expert)}))

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Row of the weight bank behind each slot of each expert."""
        row_of = {channel: row for row, channel in enumerate(self.bank_channels)}
        return tuple(tuple(row_of[channel] for channel in channels) for channels in self._slots)
