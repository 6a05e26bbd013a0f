"""The routing of the training images, epoch by epoch: the route log of a run.

Images are logged as the training step saw them, with the random crop and mirror of that epoch.

Shape suffixes: B batch, I images of a set, L MoE layers, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from advmoe.data.loader import Batch
from advmoe.device import read
from advmoe.distributed import collect, world
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing
from advmoe.routing_log import RouteLog
from advmoe.training.steps import StepResult

CLEAN, ATTACKED = "clean", "pgd"
"""Conditions of the log."""
MOST_BYTES = 2**28
"""Maximum size of a run's log in memory. If all images would take more, every k-th image is logged."""
ROW_BYTES = 16
"""Bytes per row for its index and classes, in addition to one byte for each decision."""


class _Waiting(NamedTuple):
    """Routes of a batch that are still on its device."""

    condition: tuple[str, int]
    indices: Tensor
    experts_BL: Tensor
    labels: Tensor
    taken: Tensor
    """Whether the step was taken, bool []."""


class RoutingHistory:
    """The routes of the present and the previous epoch, by row of the training images.

    Args:
        model: The network whose routing is logged.
        num_images: Number of training images.
    """

    def __init__(self, model: RoutedNetwork, num_images: int) -> None:
        self._num_layers = len(model.expert_layouts)
        num_decisions = self._num_layers * model.rows_per_image
        self._log = RouteLog([model.config.num_experts] * num_decisions)
        two_epochs = 2 * 2 * num_images * (num_decisions + ROW_BYTES)
        self._every = math.ceil(two_epochs / MOST_BYTES)
        self._waiting: list[_Waiting] = []

    def add(self, epoch: int, batch: Batch, result: StepResult) -> None:
        """Note one step of an epoch, to be logged when `take` brings its routes from the device.

        A step that was skipped is not logged, because its logits may be no numbers.
        """
        if self._num_layers:
            self._wait(CLEAN, epoch, batch, result, result.routing)
            self._wait(ATTACKED, epoch, batch, result, result.adversarial_routing)

    @property
    def waiting(self) -> list[Tensor]:
        """Tensors to read from the device."""
        return [tensor for each in self._waiting for tensor in (each.experts_BL, each.labels, each.taken)]

    def take(self, values: Sequence[Tensor]) -> None:
        """Log the waiting routes from their copies on the CPU. Only the last two epochs are kept."""
        waiting, self._waiting = self._waiting, []
        for each, experts_BL, labels, taken in zip(waiting, values[::3], values[1::3], values[2::3], strict=True):
            self._log.forget_before(each.condition[1] - 1)
            logged = (each.indices % self._every == 0) & bool(taken)
            self._log.append(each.condition, each.indices[logged], experts_BL[logged], labels=labels[logged])

    def unite(self) -> None:
        """Send the rows of all ranks to rank 0; the other ranks start again from empty logs."""
        self._take_all()
        if world().size == 1 or not self._num_layers:
            return
        mine = [] if world().leads else [(name, self._log.routes(name)) for name in self._log.conditions]
        for theirs in collect(mine):
            for name, routes in theirs:
                self._log.append(name, routes.indices, routes.experts_IL, labels=routes.labels)
        if not world().leads:
            self._log = RouteLog(self._log.num_experts)

    def figures(self, epoch: int) -> dict[str, Any]:
        """Statistics of the routers on clean images in one epoch, per MoE layer.

        Returns:
            `router_load`, the busiest expert's share of the decisions, 1/N to 1; `router_entropy`
            of the load, divided by log N: 0 is a collapsed router, 1 perfect balance. After the
            first epoch also `router_changed`, the share of decisions that differ from those for the
            same image in the epoch before, and `train_pathways_changed`, the share of images with
            any such decision in per cent, unless the epochs have no image in common. Empty without
            MoE layers, and where no image was logged because all steps were skipped.
        """
        self._take_all()
        if (CLEAN, epoch) not in self._log.conditions:
            return {}
        load = self._log.expert_load((CLEAN, epoch)).merged(self._num_layers)
        found: dict[str, Any] = {
            "router_load": load.share.max(axis=(1, 2)).round(4).tolist(),
            "router_entropy": load.evenness[:, 0].round(4).tolist(),
        }
        before = (CLEAN, epoch - 1)
        change = self._log.compare(before, (CLEAN, epoch)) if before in self._log.conditions else None
        if change is not None:
            changed_LT = change.changed_by_layer.reshape(self._num_layers, -1)
            found["router_changed"] = np.mean(changed_LT, axis=1).round(4).tolist()
            found["train_pathways_changed"] = round(100 * (1 - change.survival), 4)
        return found

    def save(self, path: Path) -> None:
        """Write the log, before the checkpoint it belongs to: steps that are done again log the same rows again."""
        if self._num_layers:
            self._take_all()
            self._log.save(path)

    def resume(self, path: Path, epoch: int) -> None:
        """Continue the log of an interrupted run. Without a log, statistics start again.

        Args:
            path: The log.
            epoch: The last epoch of which the run has taken a step. The log may hold later ones if
                the run went back to an earlier checkpoint; they are left out. So is all that no
                training logs: an evaluation has other conditions, and no epochs.

        Raises:
            DataError: The file is damaged.
            ConfigError: The log is of another model.
        """
        if not self._num_layers or not path.exists():
            return
        stored = RouteLog.load(path)
        kept = RouteLog(stored.num_experts)
        for condition in stored.conditions:
            if condition[0] in (CLEAN, ATTACKED) and 1 <= condition[1] <= epoch:
                routes = stored.routes(condition)
                kept.append(condition, routes.indices, routes.experts_IL, labels=routes.labels)
        if kept.conditions:
            self._log.merge(kept)

    def _wait(self, condition: str, epoch: int, batch: Batch, result: StepResult, routing: Routing | None) -> None:
        if routing is not None:
            experts_BL = routing.expert_index_BL.to(torch.uint8)  # the log's own form
            self._waiting.append(_Waiting((condition, epoch), batch.indices, experts_BL, batch.labels, result.finite))

    def _take_all(self) -> None:
        self.take(read(self.waiting))
