"""Compare an exported file with its module.

Routing is discontinuous. If two router logits of an image are nearly equal, a rounding error may
change its expert, and all later layers then differ. Decisions are therefore compared first, each
with its margin (chosen router logit minus the next). Logits are compared for images with equal
decisions. Of an image with different decisions, only the first different one counts, because it
causes the later ones. Enough images must have equal decisions, so that logits are compared at all.

Shape suffixes: B batch, H height, L MoE layers, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from advmoe_export.errors import ExportError, InputError
from advmoe_export.session import OPTIMIZATION_LEVELS, FloatArray, Session

BATCHES = (1, 2, 7, 64)
"""Batch sizes that are compared if the profile accepts them."""
ROUNDED = "rounded"
"""Name, beside the optimization levels, of the graph that rounds every value to float16."""
IMAGES_AT_A_TIME = 64
"""Largest batch that the module computes."""


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
class Reference:
    """The results of the module for B images."""

    images: npt.NDArray[Any]
    """Images in the input format of the file."""
    logits: FloatArray
    """[B, classes]"""
    expert_index: npt.NDArray[np.int64]
    """[B, L]"""
    margin: FloatArray
    """[B, L]; infinite if a decision does not come from router logits."""

    def __getitem__(self, rows: Any) -> Reference:
        return Reference(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


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

    @property
    def passed(self) -> bool:
        """Whether every check passed, and enough images were compared."""
        return all(check.passed for check in self.checks) and not self._too_few()

    @property
    def difference(self) -> float:
        """Largest relative difference of logits, among images with equal decisions."""
        return max((check.difference for check in self.checks), default=0.0)

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
            return self._too_few() or f"logits agree within {self.difference:.1e}"
        infinite = max(failed, key=lambda check: check.not_finite)
        if infinite.not_finite:
            hint = "; float16 ends at 65504, so export with fp32" if infinite.optimization == ROUNDED else ""
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


def run_reference(program: Any, images: npt.NDArray[Any]) -> Reference:
    """Run a traced program in torch, and record every routing decision.

    Args:
        program: a `torch.export.ExportedProgram` from float images in [0, 1] to logits.
        images: float32 [B, 3, H, W] in [0, 1] or uint8 [B, H, W, 3].
    """
    import torch

    from advmoe_export.operators import ATTRIBUTES, DOMAIN

    domain = getattr(torch.ops, DOMAIN)
    routed = {getattr(domain, name).default for name in ATTRIBUTES if hasattr(domain, name)}
    network = program.module()
    decisions = [node.args[3] for node in network.graph.nodes if node.target in routed]
    starts = range(0, len(images), IMAGES_AT_A_TIME)
    parts = [_run_module(network, decisions, images[start : start + IMAGES_AT_A_TIME]) for start in starts]
    return Reference(images=images, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _run_module(network: Any, decisions: Sequence[Any], images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """The results of one batch by their names in `Reference`.

    Args:
        network: a `torch.fx.GraphModule`.
        decisions: the node of each MoE layer's decision.
        images: as in `run_reference`.
    """
    import torch

    chosen: dict[Any, Any] = {}
    margins: dict[Any, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n in decisions:
                chosen[n] = result.reshape(len(x), -1)
                margins[n] = self.margin(n, result).reshape(len(x), -1)
            return result

        def margin(self, decision: Any, result: Any) -> Any:
            logits = self.env[decision.args[0]] if decision.target == torch.ops.aten.argmax.default else None
            if logits is None or logits.shape[-1] == 1:
                return torch.full(result.shape, torch.inf)
            first_second = logits.topk(2, dim=-1).values
            return first_second[..., 0] - first_second[..., 1]

    x = as_float_tensor(images)
    with torch.no_grad():
        logits = Recorder(network).run(x)
    none = torch.zeros((len(x), 0))
    return {
        "logits": logits.numpy(),
        "expert_index": torch.cat([none.long(), *(chosen[node] for node in decisions)], dim=1).numpy(),
        "margin": torch.cat([none, *(margins[node] for node in decisions)], dim=1).numpy(),
    }


def as_float_tensor(images: npt.NDArray[Any]) -> Any:
    """Images as a float tensor [B, 3, H, W] in [0, 1], the input of the module."""
    import torch

    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def probe_images(image_size: tuple[int, int], input_type: str, count: int = max(BATCHES)) -> npt.NDArray[Any]:
    """Synthetic images with different color, contrast and structure, so that their pathways differ."""
    rng = np.random.default_rng(0)
    height, width = image_size
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    phase = rng.uniform(0, 2 * np.pi, (count, 3, 1, 1))
    waves = rng.uniform(0, 8 * np.pi, (2, count, 1, 1, 1))
    pattern = np.sin(waves[0] * x + waves[1] * y + phase)
    noise = rng.standard_normal((count, 3, height, width)) * rng.uniform(0, 1, (count, 1, 1, 1))
    color, contrast = rng.uniform(0.1, 0.9, (count, 3, 1, 1)), rng.uniform(0.05, 0.5, (count, 1, 1, 1))
    pixels = np.rint(np.clip(color + contrast * (pattern + noise), 0, 1) * 255).astype(np.uint8)
    if input_type == "uint8":
        return cast("npt.NDArray[Any]", pixels.transpose(0, 2, 3, 1).copy())
    return cast("npt.NDArray[Any]", np.divide(pixels, 255, dtype=np.float32))


def verify(
    path: str | os.PathLike[str],
    program: Any,
    *,
    reference: Reference | None = None,
    tolerance: Tolerance | None = None,
    optimizations: Sequence[str] = OPTIMIZATION_LEVELS,
) -> VerificationReport:
    """Compare a file with its traced program, on the CPU.

    A float16 file is also compared with every value rounded to float16, because onnxruntime
    computes it in float32 on a CPU.

    Args:
        path: the `.onnx` file.
        program: `Traced.program` of the module.
        reference: results of the program for further images (`run_reference`), in the input format
            of the file.
        tolerance: largest accepted differences; the default is `TOLERANCES` of the file's dtype.
        optimizations: optimization levels of onnxruntime.
    """
    sessions = {level: Session(path, threads=1, optimization=level, check_data=False) for level in optimizations}
    metadata = next(iter(sessions.values())).metadata
    tolerance = tolerance or TOLERANCES[metadata.dtype]
    probes = run_reference(program, probe_images(metadata.image_size, metadata.input_type))
    sources = {"synthetic": probes} if reference is None else {"synthetic": probes, "given": reference}
    with _rounding_session(Path(path), metadata.dtype) as rounding:
        if rounding is not None:
            sessions[ROUNDED] = rounding
        checks = [
            _compare(source, name, batch, session, level, tolerance)
            for source, images in sources.items()
            for name, batch in _batches(source, images, metadata.batch_size)
            for level, session in sessions.items()
        ]
    return VerificationReport(path=str(Path(path)), tolerance=tolerance, checks=tuple(checks))


def compare_on(path: str | os.PathLike[str], reference: Reference, targets: npt.NDArray[Any] | None) -> Agreement:
    """Run a file on the images of a reference, and count equal labels and pathways.

    Args:
        path: the `.onnx` file.
        reference: results of the module for the images.
        targets: int64 [B], classes of the images, or None.

    Raises:
        InputError: `targets` do not give one class for each image.
    """
    check_targets(targets, len(reference.images))
    session = Session(path, check_data=False)
    with _rounding_session(Path(path), session.metadata.dtype) as rounding:
        outputs = _run(rounding or session, reference.images, max(BATCHES))
    labels, expected = outputs["logits"].argmax(axis=1), reference.logits.argmax(axis=1)
    same = (outputs.get("expert_index", reference.expert_index) == reference.expert_index).all(axis=1)
    right = None if targets is None else np.asarray(targets)
    return Agreement(
        images=len(labels),
        same_label=float((labels == expected).mean()),
        same_pathway=float(same.mean()),
        module_accuracy=None if right is None else float((expected == right).mean()),
        file_accuracy=None if right is None else float((labels == right).mean()),
    )


def check_targets(targets: npt.NDArray[Any] | None, images: int) -> None:
    """Check that there is one class for each image.

    Raises:
        InputError: the shape of `targets` is not [images].
    """
    if targets is not None and np.shape(targets) != (images,):
        raise InputError(f"expected one target per image, [{images}], got {list(np.shape(targets))}")


@contextlib.contextmanager
def _rounding_session(path: Path, dtype: str) -> Iterator[Session | None]:
    """A session that rounds every value of a float16 file to float16, as a GPU does; None for other types.

    The graph is not optimized, so no rounding is removed.
    """
    if dtype != "fp16":
        yield None
        return
    from advmoe_export.passes.rounded import write_rounded

    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "rounded.onnx"
        write_rounded(path, rounded)
        yield Session(rounded, threads=1, optimization="disable", check_data=False)


def _batches(source: str, reference: Reference, fixed: int | None) -> Iterator[tuple[str, Reference]]:
    """Batches to compare: several sizes, all images, and one image repeated, so that other experts get no image."""
    total = len(reference.images)
    sizes = BATCHES if fixed is None else (fixed,)
    for size in sizes:
        if size <= total:
            yield f"{source}, first {size}", reference[:size]
    if fixed is None:
        pathways = np.unique(reference.expert_index, axis=0, return_index=True)[1]
        for image in sorted(pathways)[:3]:
            yield f"{source}, image {image} repeated", reference[[int(image)] * 5]
    else:
        for image in range(1, min(4, total)):
            yield f"{source}, image {image} x{fixed}", reference[[image] * fixed]
    if total not in sizes:
        for start in range(0, total, 256):
            yield f"{source}, from {start}", reference[start : start + 256]


def _run(session: Session, images: npt.NDArray[Any], size: int) -> dict[str, npt.NDArray[Any]]:
    """The outputs of a file for any number of images, in batches of this size or of the file's own."""
    size = session.metadata.batch_size or size
    starts = range(0, len(images), size)
    parts = [session.execute(session.check(images[start : start + size], any_size=True)) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}


def _compare(
    source: str, batch: str, reference: Reference, session: Session, level: str, tolerance: Tolerance
) -> Check:
    layers = session.metadata.layers
    outputs = _run(session, reference.images, len(reference.images))
    chosen = outputs.get("expert_index", reference.expert_index)
    differs_BL = chosen != reference.expert_index
    flipped = np.flatnonzero(differs_BL.any(axis=1))
    flip_margin, flip_place = 0.0, ""
    for image in flipped:
        layer = int(differs_BL[image].argmax())
        margin = float(np.nan_to_num(reference.margin[image, layer], nan=np.inf, posinf=np.inf))
        if margin >= flip_margin:
            flip_margin = margin
            flip_place = (
                f"image {image} takes expert {chosen[image, layer]} instead of {reference.expert_index[image, layer]} "
                f"in layer '{layers[layer]}'"
            )
    same = np.setdiff1d(np.arange(len(chosen)), flipped)
    difference, (row, label) = _largest_difference(outputs["logits"][same], reference.logits[same], least=1e-12)
    place = f"image {same[row]}, logit {label}" if len(same) else ""
    margin_difference, margin_place = 0.0, ""
    if "router_margin" in outputs and len(same):
        found, expected = outputs["router_margin"][same], reference.margin[same]
        margin_difference, (row, column) = _largest_difference(found, expected, least=1.0)
        margin_place = f"image {same[row]}, layer '{layers[column]}'"
    not_finite = int((~np.isfinite(outputs["logits"])).any(axis=1).sum())
    return Check(
        source=source,
        batch=batch,
        size=len(chosen),
        optimization=level,
        flipped=len(flipped),
        worst_flip_margin=flip_margin,
        worst_flip=flip_place,
        difference=difference,
        worst_logit=place,
        margin_difference=margin_difference,
        worst_margin=margin_place,
        not_finite=not_finite,
        passed=bool(
            not_finite == 0
            and difference <= tolerance.logits
            and flip_margin <= tolerance.margin
            and margin_difference <= tolerance.margin
        ),
    )


def _largest_difference(
    found: npt.NDArray[Any], expected: npt.NDArray[Any], *, least: float
) -> tuple[float, tuple[int, int]]:
    """The largest |found - expected|, relative to the largest |expected| or to `least`, and its place.

    Both arrays are [rows, columns]. The difference is 0 without rows. NaN counts as infinity.
    """
    if not len(found):
        return 0.0, (0, 0)
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(found.astype(np.float64) - expected), nan=np.inf, posinf=np.inf)
    row, column = np.unravel_index(int(error.argmax()), error.shape)
    return float(error.max() / max(float(np.abs(expected).max()), least)), (int(row), int(column))
