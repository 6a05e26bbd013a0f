"""The whole evaluation of one model: every attack on every image, batch by batch. It can be
interrupted and continued.

Shape suffixes: I images of a set, K classes, L MoE layers, M pathways.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advmoe.attacks.autoattack import SQUARE_QUERIES, STANDARD, installed
from advmoe.attacks.pathways import all_pathways
from advmoe.attacks.relaxations import is_routed
from advmoe.attacks.victims import Victims
from advmoe.config import to_dict
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import ImageSet
from advmoe.distributed import collect, from_leader, gather, own_rows, together, world
from advmoe.evaluation.diagnostics import (
    Diagnostic,
    black_box,
    check_routing,
    diagnose,
    on_enough,
    routing_gap,
    routing_seen,
)
from advmoe.evaluation.machine import this_machine
from advmoe.evaluation.precision import full_precision
from advmoe.evaluation.results import PGD, ROUTE, SuiteConfig, SuiteResult, planned
from advmoe.evaluation.stages import OBSERVED, begin, predict, stages
from advmoe.evaluation.state import IMAGES, LOGITS, NUMBER, Arrays, EvaluationState, alike, read_note, write_note
from advmoe.evaluation.vocabulary import Attack
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork

STATE_LAYOUT = 7
"""Increased if an array of the state changes its meaning, or an attack what it does, so that no evaluation continues
an older state."""
RECOGNIZED = 8
"""Number of images by whose logits a state recognizes its model."""
Progress = Callable[[float, int, str], None]
"""(images done, images in all, name of the attack that begins); the name is empty before the first attack."""


def run_suite(
    model: nn.Module,
    images: ImageSet,
    config: SuiteConfig,
    *,
    numbers: NDArray[np.int64] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    state_path: Path | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Evaluate a model in fp32. The model keeps its mode.

    Several ranks take turns with the batches, and all get the whole result, which is the same in
    every world. Rank 0 alone keeps the state, and runs the diagnostics.

    Args:
        model: A module from images in [0, 1] to logits. Its routing is attacked if it is a
            `RoutedNetwork` with a choice of experts; else PGD gets further starts.
        images: The test images.
        config: Settings of the evaluation.
        numbers: The images' numbers in their data set, [I], if they are a choice of its images.
            They identify the images, and are the keys of random starts. Default: 0, 1, 2, ...
        batch_size: Images attacked at a time; changes nothing but memory and the rounding of
            convolutions.
        seed: Seed of everything random.
        state_path: File for the results of each batch and, in the unfinished batch, of each attack.
            An interrupted evaluation goes on from there, also with another batch size; the batch
            under way is then begun again. The outcome of the diagnostics lies beside it.
        progress: Called during the work.

    Raises:
        CheckpointError: The state at `state_path` belongs to another evaluation.
        ConfigError: AutoAttack is asked for and not installed, or the model is not in fp32.
        AdvMoEError: Logits or gradients are not finite.
    """
    tell = progress or (lambda *_: None)
    subject = together(lambda: identity(model, images, config, seed, numbers))
    own_path = state_path if world().leads else None
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    machines = gather(this_machine(device))
    state = together(lambda: EvaluationState(own_path, subject, machines))
    total = len(images)
    images_done = from_leader(lambda: state.images_done)
    rounds = math.ceil(math.ceil((total - images_done) / batch_size) / world().size)
    own = BatchLoader(images, batch_size=batch_size, indices=own_rows(total, batch_size, images_done)).epoch(0)

    def next_batch() -> Arrays | None:
        """All there is to know of this rank's next batch; None after its last one."""
        batch = next(own, None)
        if batch is None:
            return None
        victims = Victims.of(model, batch, config.attack, seed=seed, numbers=numbers)
        run = begin(victims, config)
        if np.array_equal(state.under_way.get("index", ()), victims.indices):  # not after another batch size
            run.restore(state.under_way)
        todo = stages(run, common_ML)
        for number, stage in enumerate(todo):
            if stage.gives not in run.arrays:
                tell(state.images_done + len(victims) * number / len(todo), total, stage.title)
                stage.work()
                if world().leads:  # its batch is the first of the round, and goes on from here in any world
                    state.keep(run.unfinished())
        run.conclude()
        return {name: run.arrays[name] for name in sorted(run.arrays)}

    def conclude() -> SuiteResult:
        result = SuiteResult(
            config=config,
            seed=seed,
            attacks=planned(config, model),
            arrays=state.arrays | {"pixels": images.digests},
            diagnostics=(),
            all_routes_tried=is_routed(model) and all_pathways(model, config.route.exhaustive) is not None,
            pathways_used=len(counts),
            machines=tuple(state.machines),
        )
        notes = None if state_path is None else state_path.with_name(f"{state_path.stem}-diagnostics.json")
        asked = subject | {
            "diagnosed": config.diagnosed,
            "square_queries": config.square_queries,
            "square_installed": installed(),  # without it black_box does not run
        }
        found = _diagnosed_before(notes, asked)
        if found is None:
            if config.diagnosed:
                tell(total, total, "diagnostics")
            found = _diagnose(model, images, result, common_ML[:OBSERVED], device)
            if notes is not None and config.diagnosed:
                write_note(notes, asked, [dataclasses.asdict(check) for check in found])
        return dataclasses.replace(result, diagnostics=found)

    with evaluating(model), full_precision(model):
        tell(images_done, total, "")
        common_ML, counts = common_pathways(model, images, batch_size, device)
        for _ in range(rounds):
            finished = collect(together(next_batch))
            together(lambda: state.add_all(arrays for arrays in finished if arrays is not None))  # noqa: B023
        return from_leader(conclude)


def _diagnosed_before(path: Path | None, asked: dict[str, Any]) -> tuple[Diagnostic, ...] | None:
    """The diagnostics that an earlier evaluation of the same kept; None if there are none."""
    content = None if path is None else read_note(path, asked)
    try:
        return None if content is None else tuple(Diagnostic(**check) for check in content)
    except TypeError:
        return None


def identity(
    model: nn.Module,
    images: ImageSet,
    config: SuiteConfig,
    seed: int,
    numbers: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """The settings that an interrupted evaluation and its continuation must share.

    Two models may have the same weights and compute something else with them. They are told apart
    by their classes and configuration, by the logits of some images, and by the numbers that modules
    of other packages hold as attributes. The logits alone do not tell apart what differs less than
    the rounding of two machines, or in the gradient only.
    """
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    pixels = hashlib.sha256(images.digests.tobytes())
    pixels.update(images.labels.tobytes())
    if numbers is not None:
        pixels.update(numbers.tobytes())
    form = hashlib.sha256(repr([(name, type(module).__qualname__) for name, module in model.named_modules()]).encode())
    if isinstance(model, RoutedNetwork):
        form.update(json.dumps(to_dict(model.config)).encode())
    logits, numbers_held = _behavior(model, images)
    if numbers_held:
        form.update(json.dumps(numbers_held).encode())
    settings = to_dict(config)
    for diagnostic_only in ("diagnosed", "square_queries"):
        del settings[diagnostic_only]
    return {
        "layout": STATE_LAYOUT,
        "model": weights.hexdigest()[:16],
        "form": form.hexdigest()[:16],
        IMAGES: pixels.hexdigest()[:16],
        NUMBER: len(images),
        LOGITS: logits,
        "seed": seed,
    } | settings


@torch.no_grad()
def _behavior(model: nn.Module, images: ImageSet) -> tuple[list[list[float]], dict[str, float]]:
    """Logits [I, K] of some images, to six digits, and the numbers that modules hold as attributes.

    The images are a little darker than they are, so that their pixels lie between the 256 levels of
    a file, where a model that rounds its input differs from one that does not. What changes from one
    pass to the next is left out: logits of a random model, and numbers such as a counter of passes.
    """
    (batch,) = BatchLoader(images, batch_size=RECOGNIZED, indices=_spread_out(len(images), RECOGNIZED)).epoch(0)
    parameter = next(model.parameters(), None)
    darker = 0.99 * (batch.images if parameter is None else batch.images.to(parameter.device))
    with evaluating(model), full_precision(model):
        (found_IK, held), (again_IK, later) = ((model(darker).double().cpu().numpy(), _held(model)) for _ in range(2))
    logits = [[float(f"{logit:.6g}") for logit in row] for row in found_IK] if alike(found_IK, again_IK) else []
    return logits, {name: value for name, value in held.items() if later.get(name) == value}


def _held(model: nn.Module) -> dict[str, float]:
    """The numbers and truth values that modules of other packages hold as attributes, by their names.

    Torch's modules and ours are known by their classes, weights and configuration, and a new version
    may give them other attributes. Text may name a device or a folder, which may change.
    """
    return {
        f"{place}.{name}": value
        for place, module in model.named_modules()
        if type(module).__module__.partition(".")[0] not in ("torch", "advmoe")
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float)
    }


def _spread_out(total: int, number: int) -> NDArray[np.int64]:
    """Rows of an image set of `total` images, at most `number`, at equal distances."""
    return np.unique(np.linspace(0, total - 1, min(number, total)).round().astype(np.int64))


def common_pathways(
    model: nn.Module, images: ImageSet, batch_size: int, device: torch.device
) -> tuple[Tensor, np.ndarray]:
    """Distinct clean pathways [M, L] and the number of images on each [M], the most frequent first."""
    own = BatchLoader(images, batch_size=batch_size, indices=own_rows(len(images), batch_size))
    mine = together(
        lambda: [
            (int(batch.indices[0]), predict(model, batch.images.to(device))[1].cpu().numpy()) for batch in own.epoch(0)
        ]
    )
    found = sorted(chain.from_iterable(gather(mine)), key=lambda batch: batch[0])
    pathways_IL = torch.from_numpy(np.concatenate([pathways for _, pathways in found]))
    if not pathways_IL.shape[1]:
        return pathways_IL[:1].to(device), np.array([len(pathways_IL)])
    distinct_ML, counts = pathways_IL.unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return distinct_ML[order].to(device), counts[order].numpy()


def _diagnose(
    model: nn.Module, images: ImageSet, result: SuiteResult, observed_ML: Tensor, device: torch.device
) -> tuple[Diagnostic, ...]:
    """Checks on evenly spaced images, and on the results of the attacks on all images."""
    config, total, right = result.config, len(images), int(result.arrays["right"].sum())
    if not config.diagnosed or not total:
        return ()
    chosen = _spread_out(total, config.diagnosed)
    (batch,) = BatchLoader(images, batch_size=len(chosen), indices=chosen).epoch(0)
    withstood = result.robust(result.white_box)
    sample = Victims.of(model, batch, config.attack, seed=result.seed, numbers=result.arrays["index"])
    kept = torch.from_numpy(withstood[chosen]).to(device)
    square = Attack("autoattack", STANDARD[-1])
    if square in result.attacks:  # more queries, and on all images
        alone = int((withstood & ~result.robust([square])).sum())
        judged = on_enough(black_box(alone, total, SQUARE_QUERIES), right)
        found = diagnose(sample, withstood=kept, square_queries=0)
        found = [judged if check.name == "black_box" else check for check in found]
    else:
        found = diagnose(sample, withstood=kept, square_queries=config.square_queries)
    if is_routed(model):
        clean, attacked = (result.arrays[f"pathway/{condition}"] for condition in ("clean", "pgd"))
        found.append(routing_seen(clean, attacked, model.config.num_experts))
        if config.routing:
            found.append(on_enough(routing_gap(result.ra(PGD), result.ra(ROUTE), total), right))
        else:
            found.append(check_routing(sample, observed_ML))
    return tuple(found)
