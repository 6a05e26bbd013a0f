"""Compare an exported file with its module.

Routing is discontinuous. If two router logits of an image are nearly equal, a rounding error may
change its expert, and all later layers then differ. Decisions are therefore compared first, each
with its margin (chosen router logit minus the next). Logits are compared for images with equal
decisions. Of an image with different decisions, only the first different one counts, because it
causes the later ones. Enough images must have equal decisions, so that logits are compared at all.
Decisions are not forced, so an expert is compared only if an image reaches it. The report counts
these images.

Shape suffixes: B batch, L MoE layers.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advmoe_export.coverage import Coverage, least
from advmoe_export.errors import InputError
from advmoe_export.reference import PROBES, Reference, first_beyond, probe_images, run_reference
from advmoe_export.report import ROUNDED, TOLERANCES, Agreement, Check, Tolerance, VerificationReport
from advmoe_export.session import OPTIMIZATION_LEVELS, Session

BATCHES = (1, 2, 7, PROBES)
"""Batch sizes that are compared if the profile accepts them."""


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
        checks, coverage = [], {level: Coverage(metadata) for level in sessions}
        for source, images in sources.items():
            for name, batch in _batches(source, images, metadata.batch_size):
                for level, session in sessions.items():
                    check, compared = _compare(source, name, batch, session, level, tolerance)
                    checks.append(check)
                    coverage[level].add(compared.expert_index)
    overflowed = next((check.source for check in checks if check.not_finite and check.optimization == ROUNDED), None)
    return VerificationReport(
        path=str(Path(path)),
        tolerance=tolerance,
        checks=tuple(checks),
        compared=least(coverage.values()),
        overflow="" if overflowed is None else _overflow(program, sources[overflowed].images),
    )


def _overflow(program: Any, images: npt.NDArray[Any]) -> str:
    """What is beyond float16 while the module computes these images, in words; empty if nothing is."""
    from advmoe_export.passes.half import LARGEST_HALF

    found = first_beyond(program, images, LARGEST_HALF)
    return "" if found is None else f"the values after '{found[0]}' reach {found[1]:.4g}"


def compare_on(path: str | os.PathLike[str], reference: Reference, targets: npt.NDArray[Any] | None) -> Agreement:
    """Run a file on the images of a reference, and count labels, pathways and experts.

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
    chosen = outputs.get("expert_index", reference.expert_index)
    same = (chosen == reference.expert_index).all(axis=1)
    right = None if targets is None else np.asarray(targets)
    return Agreement(
        images=len(labels),
        same_label=float((labels == expected).mean()),
        same_pathway=float(same.mean()),
        module_accuracy=None if right is None else float((expected == right).mean()),
        file_accuracy=None if right is None else float((labels == right).mean()),
        expert_load=tuple(
            tuple(float(share) for share in np.bincount(column, minlength=count) / len(column))
            for column, count in zip(chosen.T, session.metadata.num_experts, strict=True)
        ),
    )


def check_targets(targets: npt.NDArray[Any] | None, images: int) -> None:
    """Check that there is one class for each image.

    Raises:
        InputError: the shape of `targets` is not [images], or they are not integers.
    """
    if targets is None:
        return
    if np.shape(targets) != (images,):
        raise InputError(f"expected one target per image, [{images}], got {list(np.shape(targets))}")
    kind = np.asarray(targets).dtype
    if images and kind.kind not in "iu":
        raise InputError(f"expected targets as integers, the places of their logits, got {kind}")


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
) -> tuple[Check, Reference]:
    """Compare one batch. Returns the differences, and the images whose logits were compared."""
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
    check = Check(
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
    return check, reference[same]


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
