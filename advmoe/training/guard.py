"""Skips a step whose loss or gradients are not finite, without a trace. A row of skipped steps ends the run.

The host does not wait for a GPU: whether a step counts is a tensor on the device, read every
`READ_EVERY` steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from advmoe.distributed import collect
from advmoe.training.levels import Level

READ_EVERY = 50
"""On a GPU, the outcomes of steps are read once in this many steps."""
MOST_IN_A_ROW = 10
"""A run ends after this many skipped steps in a row, because it would not recover."""


class Kept:
    """A copy of tensors, to which they can be reset.

    Args:
        tensors: Tensors to copy. They are changed in place, and stay the same objects.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        self._groups = [(group, _flat(group)) for group in by_type.values()]

    @torch.no_grad()
    def finite(self) -> Tensor | None:
        """Whether all values of the tensors are finite, bool []; None if there are no tensors."""
        flags = [_flat(group).isfinite().all() for group, _ in self._groups]
        return torch.stack(flags).all() if flags else None

    @torch.no_grad()
    def restore(self, changed: Tensor | None = None) -> None:
        """Reset the tensors to their copied values.

        Args:
            changed: bool [], on the tensors' device. If true, the tensors keep their present
                values. None counts as false.
        """
        for group, values in self._groups:
            back = values if changed is None else torch.where(changed, _flat(group), values)
            parts = back.split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Tensors that a forward pass in training changes: the running statistics of BatchNorm and of
    the routers' centering.
    """
    return [
        buffer
        for module in modules
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


def take_step(level: Level, loss: Tensor, before: Kept, *, ask: bool | None = None) -> Tensor:
    """Update the level, unless its gradients, the loss or the statistics are not finite.

    A skipped step leaves weights, momentum and statistics as they were, bit for bit.

    Args:
        level: With the gradients of the step, those of all ranks.
        loss: Loss of all ranks.
        before: The statistics before the first pass of the step.
        ask: Whether the host may look at tensors; by default on the CPU only.

    Returns:
        Whether the step was taken, bool [], the same on all ranks.
    """
    gradients = [parameter.grad for parameter in level.parameters if parameter.grad is not None]
    finite = loss.isfinite() & _all_finite(gradients)
    if (found := before.finite()) is not None:
        finite &= found
    if loss.is_cpu if ask is None else ask:
        if finite:
            level.optimizer.step()
        else:
            before.restore()
        return finite
    _begin_momentum(level.optimizer)
    level.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused SGD then changes nothing
    level.optimizer.step()
    before.restore(changed=finite)
    return finite


def _all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether all gradients hold finite numbers, bool []."""
    if all(gradient.is_cpu for gradient in gradients):  # a tenth of the time that norms take there
        ends = [end for gradient in gradients for end in gradient.aminmax()]
        return torch.stack(ends).isfinite().all() if ends else torch.ones((), dtype=torch.bool)
    return get_total_norm(gradients, torch.inf).isfinite()


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialize the momentum of SGD with zeros, because the first step may be skipped. The first
    step is unchanged by it.

    Args:
        optimizer: A fused optimizer. Other kinds would not read whether the step is to be skipped.
    """
    assert all(group["fused"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and parameter.grad is not None:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


class Untaken(NamedTuple):
    """A skipped update."""

    step: int
    """Number of the step in the run, from 1."""
    level: str
    loss: float
    images: list[int]
    """Rows of the images of all ranks' batches in the training set. Only rank 0 knows them."""
    too_few: bool
    """Whether there were too few of them. Otherwise something was not finite."""

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"step": self.step, "level": self.level, "loss": str(self.loss), "images": self.images}


class Watch:
    """Finds the skipped steps. For steps on a GPU, it finds them some steps later."""

    def __init__(self) -> None:
        self.in_a_row: dict[str, int] = {}
        """Updates of each level up to the last one read that were not made, without one in between that was."""
        self._waiting: list[tuple[int, str, Tensor, Tensor, Tensor, bool]] = []

    def add(
        self, step: int, level: str, images: Tensor, loss: Tensor, finite: Tensor, *, too_few: bool = False
    ) -> None:
        """Note an update: its images' rows, its loss, whether it was made, and whether its images were too few."""
        self._waiting.append((step, level, images, loss, finite, too_few))

    def read(self) -> list[Untaken]:
        """The skipped ones among the updates since the last call. All ranks call this at the same step."""
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, []
        taken = torch.stack([finite for *_, finite, _ in waiting]).tolist()
        found = []
        for (step, level, images, loss, _, too_few), good in zip(waiting, taken, strict=True):
            self.in_a_row[level] = 0 if good else self.in_a_row.get(level, 0) + 1
            if not good:
                rows = [row for own in collect(images.tolist()) for row in own]
                found.append(Untaken(step, level, float(loss), rows, too_few))
        return found
