"""Compares models on the same images: the difference of two shares and its standard error.

Two models often err on the same images, so the error of their difference is smaller than the errors
of both shares suggest. Let n be the number of images, `only_a` the number that only model A
classifies correctly, and `only_b` the number that only model B does. The difference is (only_a -
only_b) / n. Its standard error is that of the mean of n values in {-1, 0, 1} (as in McNemar's
test): sqrt(only_a + only_b - (only_a - only_b)^2 / n) / n. Few such images make it unreliable, and
none make it 0.

Shape suffixes: I images of a set.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.config import ModelConfig, from_dict
from advmoe.errors import ConfigError, DataError
from advmoe.evaluation.results import PGD, WORST, SuiteResult
from advmoe.evaluation.state import Arrays
from advmoe.evaluation.vocabulary import RA, RA_AA, RA_PGD, RA_WORST, SA, Figure, pgd_in_words
from advmoe.files import write_atomically

IMAGES = ("index", "label", "pixels")
"""Arrays that identify the images. Outcomes of earlier versions have no `pixels`."""
COMPARED = (SA, RA, RA_PGD, RA_AA, RA_WORST)
"""Figures that are stored image by image."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between two models, in points of per cent."""

    points: float
    error: float
    """One standard error."""
    images: int

    def __str__(self) -> str:
        """The difference with its error: "-1.50 ± 0.41".

        If all images come out alike, the error is 0 and says nothing. The bound of the true
        difference at a confidence of 95 % stands in its place, as in `with_error`: "0.00 (< 3.00)".
        """
        if self.error == 0.0 and self.points == 0.0:
            return f"0.00 (< {min(300 / self.images, 100.0):.2f})"
        return f"{self.points:+.2f} ± {self.error:.2f}"


def told_apart(names: Sequence[str], places: Sequence[Path]) -> list[str]:
    """Names of models, no two alike.

    Args:
        names: The models' own names.
        places: Their different paths, in the same order.

    Returns:
        The names, and in place of those that are alike, the ends of their paths: as many parts of
        each as tell them apart.

    Raises:
        ConfigError: Two paths lead to one place.
    """
    parts = [place.resolve().parts for place in places]
    for position, each in enumerate(parts):
        if each in parts[:position]:
            earlier = places[parts.index(each)]
            raise ConfigError(f"models are compared with others, got {earlier} twice; leave one out")
    chosen = (
        [
            name if list(names).count(name) == 1 else "/".join(each[-length:])
            for name, each in zip(names, parts, strict=True)
        ]
        for length in range(1, max(map(len, parts)) + 1)
    )
    return next(told for told in chosen if len(set(told)) == len(told))


def paired_difference(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Difference:
    """Our share minus theirs, over the same images [I] in the same order."""
    images = len(ours)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    net = only_ours - only_theirs
    error = math.sqrt(only_ours + only_theirs - net**2 / images) / images
    return Difference(points=100 * net / images, error=100 * error, images=images)


def outcomes(result: SuiteResult) -> Arrays:
    """The images that are right, and stay right under the attacks: `index`, `label`, `pixels`, and
    one bool [I] for each figure.
    """
    kept: Arrays = {name: result.arrays[name] for name in IMAGES}
    kept |= {SA.key: result.arrays["right"], RA.key: result.robust(result.table), RA_PGD.key: result.robust([PGD])}
    if after := result.ran("autoattack"):
        kept[RA_AA.key] = result.robust(after[-1:])
    return kept | {RA_WORST.key: result.robust([WORST])}


def save_outcomes(path: Path, result: SuiteResult) -> None:
    """Write the outcomes as `.npz`, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **outcomes(result))  # type: ignore[arg-type]

    write_atomically(path, write)


def load_outcomes(path: Path) -> Arrays:
    """Read what `save_outcomes` wrote.

    Raises:
        DataError: The file is missing, or does not hold outcomes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        images = len(arrays["index"])
        sound = all(arrays[name].dtype == bool for name in (SA.key, RA.key)) and "label" in arrays
        if not sound or any(array.shape != (images,) for array in arrays.values()):
            raise ValueError("arrays of the wrong shape or type")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} does not hold the outcomes of an evaluation image by image; evaluate the model again"
        ) from error
    return arrays


def check_same_images(cards: Sequence[Mapping[str, Any]], found: Sequence[Arrays]) -> None:
    """Refuse models that were not evaluated on the same images by the same PGD.

    Args:
        cards: The models' cards.
        found: Their outcomes, in the same order.

    Raises:
        ConfigError: The images or the attacks differ.
    """
    first, images = cards[0], found[0]
    for card, right in zip(cards[1:], found[1:], strict=True):
        known = [name for name in IMAGES if name in right and name in images]
        same = all(np.array_equal(right[name], images[name]) for name in known)
        sizes = [from_dict(ModelConfig, each["advmoe"]["model"]).image_size for each in (first, card)]
        for what, ours, theirs in (
            ("data set", first["dataset"], card["dataset"]),
            ("images of", *(f"{size}x{size} pixels" for size in sizes)),
            ("images", f"{len(images['index'])}", f"{len(right['index'])}" + ("" if same else " others")),
            ("attack", *_in_unlike_words(first["advmoe"]["attack"], card["advmoe"]["attack"])),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"models are compared on the same images under the same attack, got {what} {ours} for "
                    f"{first['name']} and {theirs} for {card['name']}; evaluate them with the same settings"
                )


def _in_unlike_words(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, str]:
    """Two attacks in words, or digit by digit if they differ where the words are rounded."""
    words = pgd_in_words(ours), pgd_in_words(theirs)
    return words if ours == theirs or len(set(words)) == 2 else (str(dict(ours)), str(dict(theirs)))


def comparable(cards: Sequence[Mapping[str, Any]], found: Sequence[Arrays]) -> tuple[list[Figure], dict[str, str]]:
    """The figures that rest on the same attacks for all models.

    RA claims all attacks on the routing, so each routed model must have had them. Beside such a
    model, one without routers must have had further starts of PGD, and all of these the same number.
    For the RA under everything that was run, AutoAttack must have run on all models or on none.

    Args:
        cards: The models' cards.
        found: Their outcomes, in the same order.

    Returns:
        The figures of `COMPARED` that can be compared, and the reason for each one left out, by its key.
    """
    spared = [card["name"] for card in cards if _routed(card) and "ra_route" not in card["advmoe"]]
    starts = {card["name"]: card["advmoe"].get("further_starts", 0) for card in cards if not _routed(card)}
    attacked = [card["name"] for card in cards if "ra_route" in card["advmoe"]]
    fewer = [name for name, number in starts.items() if number < max(starts.values()) or (attacked and not number)]
    extra = [card["name"] for card in cards if RA_AA.key in card["advmoe"]]
    reasons: dict[str, str] = {}
    if fewer:
        why = (
            f"{', '.join(fewer)} got fewer starts of PGD than the other models got attempts; "
            "evaluate it with further starts"
        )
        reasons = {RA.key: why, RA_WORST.key: why}
    if spared:
        why = f"the routing of {', '.join(spared)} was not attacked; evaluate with the attacks on the routing"
        reasons |= {RA.key: why, RA_WORST.key: why}
    if 0 < len(extra) < len(cards):
        why = f"AutoAttack ran on {', '.join(extra)} only; run it on all models or on none"
        reasons = {RA_AA.key: why, RA_WORST.key: why} | reasons
    everywhere = [figure for figure in COMPARED if all(figure.key in right for right in found)]
    return [figure for figure in everywhere if figure.key not in reasons], reasons


def omissions(left_out: Mapping[str, str]) -> list[tuple[str, str]]:
    """The labels of the figures that `comparable` left out, and the reason, once for each reason."""
    return [
        ("; ".join(figure.short for figure in COMPARED if left_out.get(figure.key) == reason), reason)
        for reason in dict.fromkeys(left_out.values())
    ]


def other_starts(cards: Sequence[Mapping[str, Any]]) -> str:
    """What a comparison of evaluations with several seeds says about them; empty if all have the same seed."""
    names: dict[int, list[str]] = {}
    for card in cards:
        names.setdefault(card["advmoe"]["seed"], []).append(card["name"])
    if len(names) == 1:
        return ""
    listed = "; ".join(f"seed {seed}: {', '.join(of)}" for seed, of in names.items())
    return (
        f"The attacks began at other random points ({listed}). They were equally strong, but the differences also "
        "contain the chance of these points, about which the errors say nothing."
    )


def _routed(card: Mapping[str, Any]) -> bool:
    """Whether the model of a card has a choice of experts."""
    model = from_dict(ModelConfig, card["advmoe"]["model"])
    return model.kind == "moe" and model.num_experts > 1
