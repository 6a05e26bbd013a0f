"""The differences between a file and its module, the largest that are accepted, and their text."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from advmoe_export.coverage import Counts, warn_of_gaps
from advmoe_export.errors import ExportError

ROUNDED = "rounded"
"""Name, beside the optimization levels, of the graph that rounds every value to float16."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest accepted differences."""

    logits: float
    """Largest |difference of logits| / largest |logit| of a batch, for images with equal decisions."""
    margin: float
    """A decision may differ if the module's router margin is below this.

    An output `router_margin` may differ by this times the largest margin of a batch, or times 1.
    """
    compared: float = 0.5
    """Smallest share of equal pathways over all batches of one source at one optimization level."""


TOLERANCES = {
    "fp32": Tolerance(logits=1e-5, margin=1e-4),
    "fp16": Tolerance(logits=2e-2, margin=5e-2),
    "int8": Tolerance(logits=10.0, margin=np.inf, compared=0.0),
}
"""Tolerances by dtype.

int8 changes decisions and logits, so only the magnitude of logits is checked here. The report
contains its agreement on real images instead, which must reach `MIN_AGREEMENT`.
"""
MIN_AGREEMENT = 0.5
"""Smallest share of images to which an int8 file must give the label of the module."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One batch at one optimization level."""

    source: str
    """Origin of the images: `synthetic` or `given`."""
    batch: str
    """Name of the batch."""
    size: int
    """Number of images."""
    optimization: str
    """onnxruntime's optimization level, or `rounded` for a float16 graph in which every value is rounded."""
    flipped: int
    """Number of images with different pathways."""
    worst_flip_margin: float
    """Largest margin of a different decision (the first of its image); 0 if all are equal.

    It is infinite if the module's margin is NaN.
    """
    worst_flip: str
    """Image, layer and experts of this decision."""
    difference: float
    """Largest relative difference of logits, among images with equal decisions."""
    worst_logit: str
    """Image and logit of this difference."""
    margin_difference: float
    """Largest difference of `router_margin`, relative to the largest margin of the batch if that exceeds 1.

    It covers images with equal decisions. It is 0 if the file does not return margins.
    """
    worst_margin: str
    """Image and layer of this difference."""
    not_finite: int
    """Number of images with a logit of the file that is infinite or NaN."""
    passed: bool
    """Whether all differences are within the tolerance, and all logits are finite."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """All comparisons of a file with its module."""

    path: str
    tolerance: Tolerance
    checks: tuple[Check, ...]
    compared: Counts
    """Number of compared images that each expert computed, at the optimization level with the fewest.

    An image counts in each of its batches, unless its decisions differ there.
    """
    overflow: str = ""
    """The first layer of the module whose values are beyond float16, if that made logits infinite."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence on experts that no compared image reached, if there are any."""
        return warn_of_gaps(self.compared)

    @property
    def passed(self) -> bool:
        """Whether every check passed, and enough images were compared."""
        return all(check.passed for check in self.checks) and not self._too_few()

    @property
    def batches(self) -> int:
        """Number of batches. Each is compared at every optimization level."""
        return len({check.batch for check in self.checks})

    @property
    def difference(self) -> float:
        """Largest relative difference of logits, among images with equal decisions; NaN if there is no such image."""
        return max((check.difference for check in self.checks if check.flipped < check.size), default=math.nan)

    def to_json(self) -> str:
        """The report as a JSON object. Infinite and missing numbers are null."""
        document = {"passed": self.passed, **dataclasses.asdict(self)}
        return json.dumps(_without_infinities(document), allow_nan=False)

    def table(self) -> str:
        """The report as lines of text."""
        head = f"{'batch':<28} {'images':>6} {'optimization':<12} {'flipped':>7} {'margin':>9} {'logits':>9}"
        rows = [
            f"{c.batch:<28} {c.size:>6} {c.optimization:<12} {c.flipped:>7} {c.worst_flip_margin:>9.1e} "
            f"{c.difference:>9.1e}"
            f"{'' if c.passed else '  FAILED'}"
            for c in self.checks
        ]
        return "\n".join([head, *rows])

    def _too_few(self) -> str:
        """One line on the source with the smallest share of compared images, if it is below the tolerance."""
        images: dict[tuple[str, str], list[int]] = {}
        for check in self.checks:
            counts = images.setdefault((check.source, check.optimization), [0, 0])
            counts[0] += check.size - check.flipped
            counts[1] += check.size
        if not images:
            return ""
        (source, optimization), (same, total) = min(images.items(), key=lambda item: item[1][0] / item[1][1])
        if same >= self.tolerance.compared * total:
            return ""
        return (
            f"only {same} of {total} {source} images take the module's pathway, optimization '{optimization}', "
            f"expected a share of at least {self.tolerance.compared:g}; the logits of the others cannot be compared"
        )

    def explanation(self) -> str:
        """One line on the worst failure, or on the largest difference if there is none."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            if math.isnan(self.difference):
                return self._too_few() or "no image takes the module's pathway, so no logits were compared"
            return self._too_few() or f"logits agree within {self.difference:.1e}"
        infinite = max(failed, key=lambda check: check.not_finite)
        if infinite.not_finite:
            hint = ""
            if infinite.optimization == ROUNDED:
                place = f" and {self.overflow}" if self.overflow else ""
                hint = f"; float16 ends at 65504{place}, so export with fp32"
            return (
                f"logits of {infinite.not_finite} of {infinite.size} images are infinite or NaN "
                f"in batch '{infinite.batch}', optimization '{infinite.optimization}'{hint}"
            )
        flip = max(failed, key=lambda check: check.worst_flip_margin)
        if flip.worst_flip_margin > self.tolerance.margin:
            return (
                f"{flip.worst_flip} in batch '{flip.batch}', optimization '{flip.optimization}': "
                f"margin {flip.worst_flip_margin:.2e} is no near tie (tolerance {self.tolerance.margin:.0e})"
            )
        worst = max(failed, key=lambda check: check.margin_difference)
        if not worst.margin_difference <= self.tolerance.margin:
            return (
                f"router margins differ by {worst.margin_difference:.2e} (tolerance {self.tolerance.margin:.0e}) "
                f"at {worst.worst_margin} in batch '{worst.batch}', optimization '{worst.optimization}'"
            )
        worst = max(failed, key=lambda check: check.difference)
        return (
            f"logits differ by {worst.difference:.2e} of the largest (tolerance {self.tolerance.logits:.0e}) "
            f"at {worst.worst_logit} in batch '{worst.batch}', optimization '{worst.optimization}', "
            "of an image with equal decisions"
        )


def _without_infinities(value: Any) -> Any:
    """A JSON document with None for infinite numbers and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class VerificationError(ExportError):
    """The results of file and module differ. `report` contains the differences."""

    def __init__(self, message: str, report: VerificationReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Comparison of a file with its module on real images."""

    images: int
    same_label: float
    """Share of images with the same label."""
    same_pathway: float
    """Share of images with the same expert in every layer."""
    module_accuracy: float | None
    """Share of correct labels; None if the classes are unknown."""
    file_accuracy: float | None
    expert_load: tuple[tuple[float, ...], ...]
    """Share of the images per column of `expert_index` and expert, by the file."""
