"""Running sums over the steps of an epoch: losses, accuracies, and pathways that an attack changed.

Shape suffixes: B batch, L MoE layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advmoe.distributed import sum_up, world
from advmoe.schema import check, shown
from advmoe.training.steps import StepResult

NAMES = (
    *("images", "loss", "clean_correct", "adversarial_correct", "attacked", "fooled"),
    *("seen", "skipped", "missing"),
)


class EpochSums:
    """Sums for one level. They are a dict of tensors, which a checkpoint in mid-epoch stores."""

    def __init__(self, *, routed: bool, device: torch.device) -> None:
        self._routed = routed
        self.values = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        """All sums as one tensor, the input of `summary`."""
        self._sums: dict[str, Tensor] = dict(zip(NAMES, self.values.unbind(), strict=True))

    def add(self, result: StepResult) -> None:
        """Count one step. Of a skipped step, only the step and its images count."""
        sums, taken = self._sums, result.finite
        if world().leads:
            sums["skipped"] += ~taken
        if not result.images:  # the mean loss of no images is NaN
            return
        sums["seen"] += result.images
        sums["images"] += taken * result.images
        sums["loss"] += torch.where(taken, result.loss * result.images, 0.0)
        sums["clean_correct"] += taken * result.clean_correct
        clean, adversarial = result.routing, result.adversarial_routing
        if result.adversarial_correct is not None and clean is not None and adversarial is not None:
            clean_BL, adversarial_BL = clean.expert_index_BL, adversarial.expert_index_BL
            sums["attacked"] += taken * result.images
            sums["adversarial_correct"] += taken * result.adversarial_correct
            sums["fooled"] += taken * (clean_BL != adversarial_BL).any(dim=1).sum()

    def note_missing(self, images: int) -> None:
        """Count images of a batch that could not be decoded, of all ranks together."""
        if images and world().leads:
            self._sums["missing"] += images

    @property
    def missing(self) -> int:
        """Images that could not be decoded and were left out of batches."""
        return int(self._sums["missing"])

    @property
    def images(self) -> int:
        """Images of all steps, including skipped ones."""
        return int(self._sums["seen"])

    @property
    def skipped(self) -> int:
        """Steps that were not taken."""
        return int(self._sums["skipped"])

    def summary(self, values: Tensor | None = None) -> dict[str, float]:
        """Mean loss, training SA and RA (per cent), and the share of images whose pathway the attack changed.

        Empty as long as no step was taken.

        Args:
            values: A copy of `values` that was read before; by default they are read now.
        """
        sums = dict(zip(NAMES, (self.values if values is None else values).tolist(), strict=True))
        images, attacked = sums["images"], sums["attacked"]
        if not images:
            return {}
        figures = {"loss": sums["loss"] / images, "sa": 100 * sums["clean_correct"] / images}
        if attacked:
            figures["ra"] = 100 * sums["adversarial_correct"] / attacked
            if self._routed:
                figures["routers_fooled"] = 100 * sums["fooled"] / attacked
        return figures

    def unite(self) -> None:
        """Send the sums of all ranks to rank 0; the other ranks start again from zero."""
        if world().size > 1:
            sum_up([self.values])
            if not world().leads:
                self.values.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {name: value.cpu().clone() for name, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's sums.

        Raises:
            ConfigError: The state does not hold the sums of an epoch.
        """
        if "images" in state:  # runs from before these sums existed
            none = torch.zeros_like(state["images"])
            state = {"seen": state["images"], "skipped": none, "missing": none} | state
        check(
            set(state) == set(self._sums), f"the sums of an epoch are {', '.join(self._sums)}, got {shown(list(state))}"
        )
        for name, value in self._sums.items():
            check(state[name].shape == value.shape, f"the sum {name} must be one number")
            value.copy_(state[name])
