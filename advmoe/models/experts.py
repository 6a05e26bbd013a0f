"""The channels that each expert of a layer owns, and their places in its output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from advmoe.errors import ConfigError


def scaled_channels(num_channels: int, model_scale: float) -> int:
    """Channels of one expert, r * C rounded to the nearest integer.

    All widths come from this function, so an expert and the S-Dense layer with which it is compared
    agree.

    Raises:
        ConfigError: R is outside (0, 1], or leaves no channel.
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
    """The channels of a layer that each expert owns.

    Expert i owns the circular window of r * C channels that starts at round(i * C / N). Windows are
    disjoint if N times the (rounded) size of a window is at most C, and overlap otherwise. With
    `separate`, every expert has its own filters instead, as in the authors' released code; both
    agree at N = 2, r = 0.5. The `shared` channels come first and belong to all experts; the windows
    divide the rest.

    An expert's output is packed: it fills r * C slots, which the next layer reads for every expert
    alike. A channel of several experts has the same slot in all of them. At r = 1 every pathway is
    therefore the full backbone (paper, Sec. 5), for any N. For N > 2 such an assignment may not
    exist; then some channels have different slots in different experts.
    """

    num_channels: int
    num_experts: int
    model_scale: float
    separate: bool = False
    shared: float = 0.0
    """Share of an expert's filters that all experts have: the layer's first channels, in the first slots."""

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
        """The channel in each slot of each expert. Channels that an earlier expert has keep its
        slot; the others fill the gaps.
        """
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
        """Sorted backbone channels that some expert owns: the rows of the weight bank. The other
        channels have no weights.
        """
        return tuple(sorted({channel for expert in range(self.num_experts) for channel in self.channels(expert)}))

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Row of the weight bank behind each slot of each expert."""
        row_of = {channel: row for row, channel in enumerate(self.bank_channels)}
        return tuple(tuple(row_of[channel] for channel in channels) for channels in self._slots)
