"""The result of an evaluation as one JSON object: fields of RobustBench's model cards, and further
ones under `advmoe`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from advmoe.attacks.relaxations import DETACHED
from advmoe.config import AttackConfig, ModelConfig, to_dict
from advmoe.errors import ConfigError, DataError
from advmoe.evaluation.cost import Cost
from advmoe.evaluation.machine import in_words
from advmoe.evaluation.results import (
    EVERY_PATHWAY,
    EVERY_PATHWAY_CLEAN,
    EXPERTS,
    FURTHER,
    PGD,
    ROUTE,
    ROUTERS,
    WORST,
    SuiteResult,
    further_starts,
)
from advmoe.evaluation.vocabulary import BREAKERS, Attack, Status, Verdict, pgd_key, pixels, verdict_of
from advmoe.files import write_text_atomically
from advmoe.schema import Setting, Settings, from_dict, shown

PAPER = "https://arxiv.org/abs/2308.10110"
PERCENT = Setting("In per cent.", at_least=0.0, at_most=100.0)


def percent(share: float) -> float:
    """Per cent with two digits."""
    return round(100 * share, 2)


def standard_error(per_cent: float, images: int) -> float:
    """Standard error of a share of independent images, in points. The share is in per cent.

    At 0 and 100 % it is 0 and says nothing; `with_error` shows a bound there.
    """
    share = per_cent / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def with_error(per_cent: float, images: int, digits: int = 2) -> str:
    """A share in per cent with its standard error: "50.00 ± 5.00".

    At 0 and 100 %, it has the bound of the true share at a confidence of 95 % instead, 3 / `images`
    from there (the rule of three): "0.00 (< 3.00)".
    """
    bound = min(300 / images, 100.0)
    if per_cent <= 0.0:
        return f"{per_cent:.2f} (< {bound:.{digits}f})"
    if per_cent >= 100.0:
        return f"{per_cent:.2f} (> {100 - bound:.{digits}f})"
    return f"{per_cent:.2f} ± {standard_error(per_cent, images):.{digits}f}"


def figures(result: SuiteResult) -> dict[str, Any]:
    """All figures in per cent. Figures of attacks that were not run are absent."""

    def ra(*attacks: Attack) -> float:
        return percent(result.ra(*attacks))

    ran: dict[str, Any] = {"sa": percent(result.sa), "ra": ra(*result.table)}
    ran[f"ra_pgd{result.config.attack.steps}"] = ra(PGD)
    if views := result.ran("view"):
        ran["ra_views"] = {DETACHED: ra(PGD)} | {view.detail: ra(view) for view in views}
        ran["ra_union"] = ra(PGD, *views)
        ran["ra_route"] = ra(ROUTE)
        ran["routes_exact"] = result.all_routes_tried
        ran["ra_experts"] = ra(EXPERTS)
        ran["ra_routers"] = ra(ROUTERS)
        ran["every_pathway"] = ra(EVERY_PATHWAY_CLEAN)
        ran["ra_every_pathway"] = ra(EVERY_PATHWAY)
        radius = result.arrays["flip_radius"]
        ran["routers_flipped_within"] = {
            pixels(eps): percent(float((radius <= eps).mean()))
            for eps in np.unique(radius[np.isfinite(radius)]).tolist()
        }
    if result.ran("further"):
        ran["ra_further_starts"] = ra(PGD, FURTHER)
        ran["further_starts"] = further_starts(result.config)
    if after := result.ran("autoattack"):
        ran["ra_aa"] = ra(after[-1])
        ran["ra_aa_after"] = {attack.detail: ra(attack) for attack in after}
    ran["ra_worst"] = ra(WORST)
    if sweep := result.ran("eps"):
        ran["ra_by_eps"] = {pixels(float(attack.detail)): ra(attack) for attack in sweep}
    if result.arrays["pathway/clean"].shape[1]:
        changed = (result.arrays["pathway/clean"] != result.arrays["pathway/pgd"]).any(axis=1)
        ran["routers_fooled"] = percent(float(changed.mean()))
        ran["pathways"] = result.pathways_used
    ran["standard_error"] = round(standard_error(100 * result.ra(WORST), result.images), 2)
    return ran


@dataclass(frozen=True, kw_only=True)
class DiagnosticEntry(Settings):
    """A diagnostic in a card."""

    name: str
    status: Status
    value: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class CardNumbers(Settings):
    """The fields under `advmoe` in a card, except `ra_pgdK`, whose key contains the attack's steps K."""

    images: Annotated[int, Setting("Images evaluated.", at_least=1)]
    seed: int
    attack: AttackConfig
    verdict: Verdict
    diagnostics: list[DiagnosticEntry]
    parameters: int
    gflops: float
    latency_ms_per_image: dict[str, float]
    model: ModelConfig
    method: str
    epochs: int | None
    device: str
    versions: dict[str, str]
    latency_device: str | None = None
    sa: Annotated[float, PERCENT]
    ra: Annotated[float, PERCENT]
    ra_worst: Annotated[float, PERCENT]
    standard_error: float
    trusted: bool | None
    checkpoint_sha256: Annotated[str | None, Setting("SHA-256 of the evaluated file, in hexadecimal.")] = None
    training_seconds: float | None = None
    control: str | None = None
    recipe: str | None = None
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)
    ra_views: dict[str, float] = field(default_factory=dict)
    ra_union: Annotated[float | None, PERCENT] = None
    ra_route: Annotated[float | None, PERCENT] = None
    ra_further_starts: Annotated[float | None, PERCENT] = None
    further_starts: Annotated[int | None, Setting("Starts of PGD after the first ones.", at_least=0)] = None
    routes_exact: Annotated[bool | None, Setting("Whether the route attack made an attempt on every pathway.")] = None
    ra_experts: Annotated[float | None, PERCENT] = None
    ra_routers: Annotated[float | None, PERCENT] = None
    every_pathway: Annotated[float | None, PERCENT] = None
    ra_every_pathway: Annotated[float | None, PERCENT] = None
    routers_flipped_within: dict[str, float] = field(default_factory=dict)
    ra_aa: Annotated[float | None, PERCENT] = None
    ra_aa_after: dict[str, float] = field(default_factory=dict)
    ra_by_eps: dict[str, float] = field(default_factory=dict)
    routers_fooled: Annotated[float | None, PERCENT] = None
    pathways: int | None = None
    mask_iou: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CardFile(Settings):
    """The fields of a card file: those of RobustBench, and one more, `advmoe`."""

    name: str
    dataset: str
    architecture: str
    eps: str
    clean_acc: str
    reported: str
    autoattack_acc: str | None
    unreliable: bool | None
    link: str
    authors: str
    additional_data: bool
    number_forward_passes: int
    venue: str
    advmoe: CardNumbers
    external: str = ""
    footnote: str = ""


def make_card(
    result: SuiteResult,
    *,
    name: str,
    dataset: str,
    model: ModelConfig,
    train: dict[str, Any],
    cost: Cost,
    device: str,
    latency: Mapping[int, float] | None = None,
    checkpoint_sha256: str | None = None,
    training_seconds: float | None = None,
    recipe: str | None = None,
    control: str | None = None,
) -> dict[str, Any]:
    """The card of an evaluated checkpoint.

    Args:
        result: The outcome of the evaluation.
        name: The model's name in the card.
        dataset: Name of the data set with the test images.
        model: The model's configuration.
        train: The training configuration in the checkpoint.
        cost: The cost of the model.
        device: Hardware of this process, on which the latency was measured.
        latency: Milliseconds per image by batch size, if measured.
        checkpoint_sha256: SHA-256 of the checkpoint file, in hexadecimal, if the model is from one.
        training_seconds: Duration of the training, if known.
        recipe: Name of the paper's run, if the model is from one.
        control: Name of the control (`advmoe.evaluation.controls`), if the model is one.
    """
    numbers = figures(result)
    verdict = verdict_of({diagnostic.name: diagnostic.status for diagnostic in result.diagnostics})
    trusted = None if verdict == "not checked" else verdict == "trusted"
    kind = {"moe": "MoE", "s_dense": "S-Dense", "sparse_cnn": "Sparse-CNN", "dense": "Dense"}[model.kind]
    card: dict[str, Any] = {
        "link": PAPER if recipe else "",
        "name": name,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": "Unpublished",
        "architecture": f"{model.arch} ({kind})",
        "eps": pixels(result.config.attack.eps),
        "clean_acc": f"{numbers['sa']:.2f}",
        "reported": f"{numbers['ra_worst']:.2f}",
        "autoattack_acc": f"{numbers['ra_aa']:.2f}" if "ra_aa" in numbers else None,
        "unreliable": None if trusted is None else not trusted,
    }
    if breakers := beyond_autoattack(result):
        card["external"] = card["reported"]
        card["footnote"] = f"Images that withstand AutoAttack are broken by {', '.join(breakers)}."
    card["advmoe"] = numbers | {
        "images": result.images,
        "seed": result.seed,
        "attack": to_dict(result.config.attack),
        "verdict": verdict,
        "trusted": trusted,
        "diagnostics": [to_dict(diagnostic) for diagnostic in result.diagnostics],
        "parameters": cost.parameters,
        "gflops": float(f"{cost.gflops:.6g}"),  # digits that count for small networks, too
        "latency_ms_per_image": {str(size): float(f"{ms:.4g}") for size, ms in (latency or {}).items()},
        "model": to_dict(model),
        "method": train.get("method", ""),
        "epochs": train.get("epochs"),
        "checkpoint_sha256": checkpoint_sha256,
        "training_seconds": training_seconds,
        "recipe": recipe,
        "control": control,
        "controls": {},
        "latency_device": device if latency else None,
    }
    card["advmoe"] |= in_words(result.machines)
    return card


def beyond_autoattack(result: SuiteResult) -> list[str]:
    """The attacks that broke images which AutoAttack did not, in words; none if it broke all that were broken.

    Each image counts for the first attack that broke it, because later ones may not have met it.
    The column of RA-E says what happens on a frozen pathway, so RA-E is named if no other attack
    broke an image on the model itself.
    """
    if not (after := result.ran("autoattack")):
        return []
    left = result.robust([after[-1]]) & ~result.robust([WORST])
    found = []
    for attack in (attack for attack in result.attacks if attack.family in BREAKERS and attack != EXPERTS):
        if (left & ~result.robust([attack])).any():
            found.append(BREAKERS[attack.family])
        left &= result.robust([attack])
    if left.any():
        found.append(BREAKERS["experts"])
    return list(dict.fromkeys(found))


def latencies(numbers: Mapping[str, Any]) -> str:
    """The latency in words, empty if it was not measured."""
    measured = numbers.get("latency_ms_per_image", {})
    words = ", ".join(f"{ms:.3g} ms an image (batch {size})" for size, ms in measured.items())
    return f"{words} on {numbers.get('latency_device') or numbers['device']}" if words else ""


def save_card(path: Path, card: dict[str, Any]) -> None:
    """Write a card, whole or not at all."""
    text = json.dumps(card, indent=2) + "\n"
    write_text_atomically(path, text)


def load_card(path: Path) -> dict[str, Any]:
    """Read a card, checked against `CardFile`.

    Raises:
        DataError: The file is missing or no card of this project.
    """
    if not path.is_file():
        raise DataError(
            f"there is no result card {path}; expected the output folder of 'advmoe evaluate', which writes one"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        numbers = dict(card["advmoe"])
        value = numbers.pop(pgd_key(numbers))
        if not isinstance(value, int | float):
            raise ConfigError(f"RA under PGD must be a number, got {shown(value)}")
        from_dict(CardFile, card | {"advmoe": numbers})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not a result card: {reason}; expected the card of an evaluation") from error
    return dict(card)
