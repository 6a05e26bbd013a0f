"""A step whose loss or gradient is not finite is not taken: it leaves no trace, and a run of such steps ends the run.

No host waits for a GPU here: whether a step counts is a tensor on its device, and is read every `READ_EVERY` steps.
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
"""On a GPU, so many steps pass between two looks at what became of them."""
MOST_IN_A_ROW = 10
"""After so many steps in a row that could not be taken a run ends: it would not find back."""


class Kept:
    """Tensors as they are now, to go back to.

    Args:
        tensors: to be kept. They are changed in place, and stay the same objects.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        self._groups = [(group, _flat(group)) for group in by_type.values()]

    @torch.no_grad()
    def finite(self) -> Tensor | None:
        """Whether the tensors hold finite numbers now, bool []; None if there are none."""
        flags = [_flat(group).isfinite().all() for group, _ in self._groups]
        return torch.stack(flags).all() if flags else None

    @torch.no_grad()
    def restore(self, changed: Tensor | None = None) -> None:
        """Give the tensors their values of then back.

        Args:
            changed: bool [], on their device; where it holds they keep their present values. None: they do not.
        """
        for group, values in self._groups:
            back = values if changed is None else torch.where(changed, _flat(group), values)
            parts = back.split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What a forward pass in training changes: the running statistics of BatchNorm and of the routers' centring."""
    return [
        buffer
        for module in modules
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


def take_step(level: Level, loss: Tensor, before: Kept, *, ask: bool | None = None) -> Tensor:
    """Move the level by its gradients, unless they, the loss or the statistics are not finite.

    Then weights, momentum and statistics are, to the bit, what they were before the step.

    Args:
        level: with the gradients of the step, those of all ranks.
        loss: of all ranks.
        before: the statistics before the first pass of the step.
        ask: whether the host may look at tensors; by default on the CPU only.

    Returns:
        Whether the step was taken, bool [], the same on all ranks.
    """
    gradients = [parameter.grad for parameter in level.parameters if parameter.grad is not None]
    finite = loss.isfinite() & get_total_norm(gradients, torch.inf).isfinite()
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


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let the momentum of SGD begin with zeros, and not with a step that may not be taken; its first step is the same.

    Args:
        optimizer: a fused one. Others would not see whether the step is to be taken.
    """
    assert all(group["fused"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and parameter.grad is not None:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


class Untaken(NamedTuple):
    """An update that was not made."""

    step: int
    """Number of the step in the run, from 1."""
    level: str
    loss: float
    images: list[int]
    """Rows of its images in the training set, those of all ranks."""

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"step": self.step, "level": self.level, "loss": str(self.loss), "images": self.images}


class Watch:
    """Finds out which steps were not taken, some steps later where they were made on a GPU."""

    def __init__(self) -> None:
        self.in_a_row = 0
        """Steps up to the last one read that were not taken, without one in between that was."""
        self._waiting: list[tuple[int, str, Tensor, Tensor, Tensor]] = []

    def add(self, step: int, level: str, images: Tensor, loss: Tensor, finite: Tensor) -> None:
        """Note an update: its images' rows, its loss and whether it was made."""
        self._waiting.append((step, level, images, loss, finite))

    def read(self) -> list[Untaken]:
        """What was not taken of the updates noted since the last time; to be called by all ranks at the same step."""
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, []
        taken = torch.stack([finite for *_, finite in waiting]).tolist()
        found = []
        failed: dict[int, bool] = {}
        for (step, level, images, loss, _), good in zip(waiting, taken, strict=True):
            failed[step] = failed.get(step, False) or not good
            if not good:
                rows = [row for own in collect(images.tolist()) for row in own]
                found.append(Untaken(step, level, float(loss), rows))
        for bad in failed.values():
            self.in_a_row = self.in_a_row + 1 if bad else 0
        return found
