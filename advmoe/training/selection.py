"""Chooses the best epoch of a run from the outcome of each validation image.

The rule chooses the latest epoch whose RA is at most one standard error of the paired difference
below the highest RA. A smaller difference may be chance, which is no reason to prefer an early
epoch. If RA cannot separate two such epochs, SA may: the earlier one is kept if its SA is higher by
more than its standard error.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe.errors import CheckpointError

Outcome = NDArray[np.bool_]
"""Whether each validation image is classified correctly [I]."""
OUTCOMES = {"peak_robust", "best_robust", "best_right"}
"""Outcomes that are kept: those of the epoch with the highest RA, and of the best epoch."""
FEW_IMAGES = 200
"""Below this number of validation images the standard error of an RA of 50 % exceeds 3.5 points."""


def clearly_better(one: Outcome, other: Outcome) -> bool:
    """Whether the share of correct images is higher by more than the standard error of the paired difference.

    Of n images, g are correct under `one` only and l under `other` only. The difference is (g -
    l)/n, its variance ((g + l) - (g - l)²/n) / (n (n - 1)). Solved for g and l, the difference
    exceeds its standard error exactly if (g - l)² > g + l: McNemar's statistic is above 1. Whole
    numbers decide, and no rounding.
    """
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    return gained > lost and (gained - lost) ** 2 > gained + lost


def standard_error_at_half(images: int) -> float:
    """Standard error of a share of 50 %, in points: the maximum for this number of images."""
    return 100 * math.sqrt(0.25 / max(images, 1))


class Selection:
    """The rule, applied epoch by epoch; its state goes into checkpoints."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Outcome] = {}

    def better(self, right: Outcome, robust: Outcome) -> bool:
        """Whether the epoch that has just ended is the best so far.

        Args:
            right: Whether each clean image is correct [I].
            robust: Whether each image is correct under attack [I].
        """
        known = self._outcomes
        if not known or robust.sum() >= known["peak_robust"].sum():
            known["peak_robust"] = robust
        elif clearly_better(known["peak_robust"], robust):
            return False
        if "best_robust" in known:
            equal = not any(clearly_better(other, known["best_robust"]) for other in (robust, known["peak_robust"]))
            if equal and clearly_better(known["best_right"], right):
                return False
        known |= {"best_right": right, "best_robust": robust}
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The outcomes that the next epoch is compared with."""
        return {name: torch.from_numpy(outcome) for name, outcome in self._outcomes.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's outcomes.

        Raises:
            CheckpointError: The outcomes are of other images or another form.
        """
        forms = {(value.dtype, value.shape) for value in state.values()}
        if state and (state.keys() != OUTCOMES or len(forms) != 1 or next(iter(forms))[0] != torch.bool):
            raise CheckpointError("the outcomes of its validation are damaged")
        self._outcomes = {name: value.numpy() for name, value in state.items()}
