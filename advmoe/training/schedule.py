"""The phases of a run, each with its own learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from advmoe.models.network import RoutedNetwork
from advmoe.training.levels import LevelName


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A training that starts from the weights of the phase before, with the rate at its peak and momentum zero."""

    length: float = 1.0
    """Epochs relative to the requested number; at least one."""
    peak: float = 1.0
    """Peak learning rate relative to the requested one."""
    part: LevelName | None = None
    """The only part of the network that changes; None: every level of the method."""
    begin: Callable[[RoutedNetwork], None] | None = None
    """Change of the network before the first step."""


@dataclass(frozen=True)
class Span:
    """A phase and its place in the run."""

    phase: Phase
    first: int
    """Its first step."""
    steps: int


class Schedule:
    """The phase and the learning rate of each step of a run.

    Args:
        phases: The phases in their order.
        epochs: Requested number of epochs.
        steps_per_epoch: Steps of an epoch.
    """

    def __init__(self, phases: Sequence[Phase], epochs: int, steps_per_epoch: int) -> None:
        lengths = [max(1, round(phase.length * epochs)) for phase in phases]
        self.epochs = sum(lengths)
        self.steps = self.epochs * steps_per_epoch
        self._spans: list[Span] = []
        first = 0
        for phase, length in zip(phases, lengths, strict=True):
            self._spans.append(Span(phase, first, length * steps_per_epoch))
            first += length * steps_per_epoch

    def span(self, step: int) -> Span:
        """The phase that a step belongs to."""
        return next(span for span in reversed(self._spans) if span.first <= step)

    def rate(self, step: int, peak: float) -> float:
        """The learning rate of a step, if `peak` is the requested peak."""
        span = self.span(step)
        return cosine(step - span.first, span.steps, span.phase.peak * peak)

    def is_final(self, step: int) -> bool:
        """Whether the network after this number of steps is of the kind that the run trains."""
        return step > self._spans[-1].first


def cosine(step: int, total: int, peak: float) -> float:
    """Learning rate of a step: from `peak` at 0 down to 0 at `total`."""
    return 0.5 * peak * (1.0 + math.cos(math.pi * step / total))
