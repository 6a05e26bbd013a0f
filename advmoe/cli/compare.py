"""`advmoe compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.evaluate import OUTCOMES, Measuring, Subject, Tested, training_radius
from advmoe.cli.options import BatchSize, DataDir, Device, Json, LimitEval, Seed, SkipBadImages, flag, given
from advmoe.config import AttackConfig, check, to_dict
from advmoe.run_paths import CARD, checkpoint_of

if TYPE_CHECKING:
    from advmoe.evaluation.state import Arrays


def compare(
    models: Annotated[
        list[Path],
        typer.Argument(help="Run folders, checkpoints, or evaluation folders. The first one is the reference."),
    ],
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="PGD steps, for runs and checkpoints.")] = 50,
    eps: Annotated[
        str | None, typer.Option(help="Radius of the attack, e.g. 8/255. Default: that of the first model's training.")
    ] = None,
    autoattack: Annotated[bool, typer.Option("--autoattack", help="Run AutoAttack, too.")] = False,
    diagnose: Annotated[int, typer.Option(help="Images for the diagnostics of runs and checkpoints; 0: none.")] = 64,
    limit_eval: LimitEval = None,
    skip_bad_images: SkipBadImages = False,
    batch_size: BatchSize = 256,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare models on the same images: SA, RA, and their differences from the first model with paired errors.

    RA is what withstands PGD and, for a routed model, every view of its routing and the route
    attack; another model gets as many further starts of PGD. Runs and checkpoints are evaluated now;
    evaluation folders are compared as they are, and take no options. An RA that rests on unequal
    attacks is left out.
    """
    from advmoe.attacks.autoattack import check_classes
    from advmoe.evaluation.card import load_card, standard_error, with_error
    from advmoe.evaluation.paired import (
        check_same_images,
        comparable,
        load_outcomes,
        omissions,
        other_starts,
        paired_difference,
        told_apart,
    )
    from advmoe.evaluation.results import SuiteConfig
    from advmoe.evaluation.vocabulary import RA, attacks_met, pgd_in_words

    check(len(models) >= 2, "compare needs two models or more")
    check(limit_eval is None or limit_eval >= 1, f"--limit-eval must be at least 1, got {limit_eval}")
    meaningless = [flag(name) for name in context.params if name not in ("models", "json") and given(context, name)]
    check(
        not meaningless or not all(map(_evaluated, models)),
        f"{', '.join(meaningless)} would change nothing, because all models are evaluation folders, which are compared "
        "as they are; leave it out, or give runs or checkpoints",
    )
    radius = None if eps is None else console.number(eps, "--eps")
    cards: list[dict[str, Any]] = []
    found: list[Arrays] = []
    planned: list[Planned | None] = []
    places: list[Path] = []
    for path in models:
        plan, place = None, path
        if _evaluated(path):
            card, right = load_card(path / CARD), load_outcomes(path / OUTCOMES)
            radius = card["advmoe"]["attack"]["eps"] if radius is None else radius
        else:
            place = checkpoint_of(path)
            subject = Subject.load(place, device=device)
            radius = training_radius(subject.contents) if radius is None else radius
            attack = AttackConfig(eps=radius, steps=steps, step_size=radius / 4)
            if autoattack:
                check_classes(subject.contents.model.num_classes)
            config = SuiteConfig(attack=attack, autoattack=autoattack, diagnosed=diagnose)
            earlier = [other.measuring.tested for other in planned if other is not None]
            read = subject.images(None, data_dir, limit_eval, skip_bad_images=skip_bad_images)
            tested = _once(read, earlier)
            plan = Planned(subject, Measuring(config, tested, batch_size, seed, False))
            card, right = plan.known()
        cards.append(card)
        found.append(right)
        planned.append(plan)
        places.append(place)
    names = told_apart([card["name"] for card in cards], places)
    cards = [card | {"name": name} for card, name in zip(cards, names, strict=True)]
    check_same_images(cards, found)  # before hours of attacks
    for number, plan in enumerate(planned):
        if plan is not None:
            measured, found[number] = plan.measure()
            cards[number] = measured | {"name": names[number]}
    kept, left_out = comparable(cards, found)
    rows = []
    for card, right in zip(cards, found, strict=True):
        row: dict[str, Any] = {"name": card["name"], "verdict": card["advmoe"]["verdict"]}
        row |= {"seed": card["advmoe"]["seed"], "attacks": attacks_met(card["advmoe"])}
        row |= {name: card["advmoe"][name] for name in ("gflops", "parameters", "training_seconds")}
        for figure in kept:
            share = 100 * float(right[figure.key].mean())
            row[figure.key] = round(share, 2)
            row[f"{figure.key}_error"] = round(standard_error(share, len(right["index"])), 2)
            if right is not found[0]:
                difference = paired_difference(right[figure.key], found[0][figure.key])
                row[f"{figure.key}_difference"] = round(difference.points, 2)
                row[f"{figure.key}_difference_error"] = round(difference.error, 2)
        rows.append(row)
    attack = cards[0]["advmoe"]["attack"]  # that of all
    if json:
        facts = {"dataset": cards[0]["dataset"], "images": len(found[0]["index"]), "attack": attack}
        console.emit_json(facts | {"models": rows, "left_out": left_out})
        return
    table = []
    for row, right in zip(rows, found, strict=True):
        minutes = "-" if row["training_seconds"] is None else f"{row['training_seconds'] / 60:.1f}"
        shares = (with_error(100 * float(right[figure.key].mean()), len(right["index"])) for figure in kept)
        attacks = ", ".join(row["attacks"])
        table.append((row["name"], *shares, attacks, f"{row['gflops']:.4g}", minutes, row["verdict"]))
    chance = other_starts(cards)
    title = f"{len(found[0]['index'])} test images of {cards[0]['dataset']}, per cent; {pgd_in_words(attack)}"
    title += "" if chance else f", seed {rows[0]['seed']}"
    columns = ("", *(figure.short for figure in kept), "attacks", "GFLOPs", "training, min", "verdict")
    console.show_table(title, columns, table)
    differences = [
        (row["name"], *(str(paired_difference(right[figure.key], found[0][figure.key])) for figure in kept))
        for row, right in zip(rows[1:], found[1:], strict=True)
    ]
    title = f"Difference from {rows[0]['name']} on the same images, points ± one paired standard error"
    console.show_table(title, ("", *(figure.short for figure in kept)), differences)
    if chance:
        console.note(chance)
    for labels, reason in omissions(left_out):
        option = " (advmoe evaluate --routing)" if reason == left_out.get(RA.key) else ""
        console.note(f"Left out: {labels}. Reason: {reason}{option}.")


def _evaluated(path: Path) -> bool:
    """Whether a path is the folder of a finished evaluation, and not a run or a checkpoint."""
    return (path / CARD).is_file()


@dataclass(frozen=True)
class Planned:
    """A run or checkpoint that is measured once all models and images have been read."""

    subject: Subject
    measuring: Measuring

    def known(self) -> tuple[dict[str, Any], Arrays]:
        """What is known of its card and its outcomes before it is measured: all that `check_same_images` reads."""
        import numpy as np

        tested = self.measuring.tested
        card = {
            "name": self.subject.name,
            "dataset": tested.dataset,
            "advmoe": {
                "attack": to_dict(self.measuring.config.attack),
                "model": to_dict(self.subject.contents.model),
            },
        }
        numbers = np.arange(len(tested.images)) if tested.numbers is None else tested.numbers
        return card, {"index": numbers, "label": tested.images.labels, "pixels": tested.images.digests}

    def measure(self) -> tuple[dict[str, Any], Arrays]:
        """Its card and its outcomes."""
        from advmoe.evaluation.paired import outcomes

        card, result = self.measuring.card_of(self.subject, None)
        return card, outcomes(result)


def _once(tested: Tested, earlier: Sequence[Tested]) -> Tested:
    """The images of an earlier model if they are the same, so that memory holds them once."""
    import numpy as np

    for other in earlier:
        if np.array_equal(other.images.images, tested.images.images) and np.array_equal(
            other.images.labels, tested.images.labels
        ):
            return other
    return tested
