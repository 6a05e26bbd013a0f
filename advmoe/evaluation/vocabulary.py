"""The names of results: the label of each figure in cards, tables, plots and reports, and the
meaning of each verdict.

Cards (`advmoe.evaluation.card`) contain the keys. All other places take a figure's label from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Family = Literal["pgd", "view", "route", "further", "experts", "routers", "every_pathway", "autoattack", "eps", "worst"]
"""Kinds of attack; `advmoe.evaluation.results` says what each does."""


class Attack(NamedTuple):
    """An attack of an evaluation: its kind and, if there are several of that kind, a detail."""

    family: Family
    detail: str = ""

    @property
    def column(self) -> str:
        """Its name among the arrays of an evaluation: one bool per image, true if the image withstands the attack."""
        return "/".join(("robust", self.family, *([self.detail] if self.detail else ())))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a result card: a share of all images in per cent."""

    key: str
    short: str
    """Label on axes and in narrow tables."""
    long: str
    """Label in reports and on the command line."""

    def of(self, numbers: Mapping[str, Any]) -> float | None:
        """Its value among the figures of a card; None if it was not measured."""
        value = numbers.get(pgd_key(numbers) if self.key == "ra_pgd" else self.key)
        return None if value is None else float(value)

    def label(self, numbers: Mapping[str, Any]) -> str:
        """Its long label; that of RA under PGD says which PGD of the card it is."""
        if self.key != "ra_pgd":
            return self.long
        return f"{self.long}-{numbers['attack']['steps']}, eps {pixels(numbers['attack']['eps'])}"


BREAKERS: Mapping[Family, str] = {
    "pgd": "PGD",
    "view": "PGD through the views of the routing",
    "route": "the route attack",
    "further": "further starts of PGD",
    "routers": "RA-R",
    "experts": "RA-E",
}
"""Attacks at the full radius whose successes on the model itself count for the worst RA, beside AutoAttack."""


def pgd_key(numbers: Mapping[str, Any]) -> str:
    """The key of RA under PGD, which names the attack's steps, such as `ra_pgd50`."""
    return f"ra_pgd{numbers['attack']['steps']}"


def pixels(eps: float) -> str:
    """A radius in the usual notation, 8/255, with five digits: the names of results hold six."""
    return f"{255 * eps:.5g}/255"


def pgd_in_words(attack: Mapping[str, Any]) -> str:
    """The settings of a card's PGD, all that its RA depends on but the seed."""
    return (
        f"PGD-{attack['steps']}, eps {pixels(attack['eps'])}, step {pixels(attack['step_size'])}, "
        f"{attack['restarts']} restart(s), start {attack['start']}"
    )


SA = Figure(key="sa", short="SA", long="SA, clean images")
RA = Figure(key="ra", short="RA", long="RA: PGD, and all attacks on the routing or further starts")
RA_PGD = Figure(key="ra_pgd", short="RA, PGD", long="RA under PGD")
RA_ROUTE = Figure(key="ra_route", short="RA, route", long="RA under the route attack as well")
RA_FURTHER = Figure(key="ra_further_starts", short="RA, further starts", long="RA under PGD, further starts as well")
RA_AA = Figure(key="ra_aa", short="RA, AutoAttack", long="RA under AutoAttack (standard)")
RA_WORST = Figure(key="ra_worst", short="RA, worst", long="RA under everything that was run")
FIGURES = (
    SA,
    RA_PGD,
    Figure(key="ra_union", short="RA, views", long="RA under PGD through every view of the routing"),
    RA_ROUTE,
    RA_FURTHER,
    RA_AA,
    RA,
    RA_WORST,
    Figure(key="ra_experts", short="RA-E, experts", long="RA-E: experts attacked, routing frozen"),
    Figure(key="ra_routers", short="RA-R, routers", long="RA-R: only routers attacked"),
    Figure(key="every_pathway", short="every pathway", long="right on every pathway in use"),
    Figure(key="ra_every_pathway", short="RA, every pathway", long="right on every pathway, each attacked"),
)
"""Accuracies in the order in which they are shown."""
FOOLED = Figure(key="routers_fooled", short="pathways changed", long="images whose pathway PGD changes")


def measured(numbers: Iterable[Mapping[str, Any]], figures: Iterable[Figure] = FIGURES) -> list[Figure]:
    """The figures that at least one card has; RA only if it is more than RA under PGD on one of them."""
    cards = list(numbers)
    further = any(key in card for card in cards for key in (RA_ROUTE.key, RA_FURTHER.key))
    return [
        figure
        for figure in figures
        if (figure is not RA or further) and any(figure.of(card) is not None for card in cards)
    ]


def attacks_met(numbers: Mapping[str, Any]) -> list[str]:
    """The attacks at the full radius behind the figures of a card, by short names."""
    met = ["PGD"]
    if "ra_route" in numbers:
        met.append("routing")
    if number := numbers.get("further_starts"):
        met.append(f"{number} further starts")
    if RA_AA.key in numbers:
        met.append("AutoAttack")
    return met


class Fate(NamedTuple):
    """One of the four classes of adversarial examples (paper, Figs. 4 and 5)."""

    key: str
    label: str


FATES = (
    Fate("router_survives_right", "1: router survives, right"),
    Fate("router_fooled_right", "2: router fooled, right"),
    Fate("router_survives_wrong", "3: router survives, wrong"),
    Fate("router_fooled_wrong", "4: both fooled"),
)
ROBUSTNESS = (
    Fate("router_robustness", "router robustness, 1 + 3"),
    Fate("moe_robustness", "MoE robustness, 1 + 2"),
)
"""Sums of the four classes."""

Verdict = Literal["trusted", "not to be trusted", "not checked"]
Status = Literal["passed", "failed", "info", "not run"]


ATTACK_CHECKS = ("zero_gradients", "large_eps", "one_step", "converged")
"""Checks of PGD itself. Unless they pass, nothing is known of an RA."""


def verdict_of(statuses: Mapping[str, Status]) -> Verdict:
    """The verdict that follows from the outcomes of all diagnostics, by name."""
    if "failed" in statuses.values():
        return "not to be trusted"
    return "trusted" if all(statuses.get(name) == "passed" for name in ATTACK_CHECKS) else "not checked"


class Reading(NamedTuple):
    """Explanation of a failed diagnostic."""

    meaning: str
    next_step: str


READINGS: Mapping[str, Reading] = {
    "finite": Reading(
        "Some logits or gradients are NaN or infinite. The attack stands still on such images, so they look robust.",
        "Check the training log for a loss that diverged. Train again with a lower learning rate.",
    ),
    "logits": Reading(
        "The model outputs probabilities. A second softmax in the attack's loss flattens its gradient.",
        "Remove the softmax from the model's output and evaluate again.",
    ),
    "deterministic": Reading(
        "The model answers at random. An attack on one random draw overstates robustness.",
        "Switch randomness off in evaluation mode, or attack the expected output.",
    ),
    "batch_invariant": Reading(
        "A prediction depends on the other images of the batch.",
        "Look for BatchNorm in training mode, or for other statistics over the batch.",
    ),
    "input_range": Reading(
        "The model does better on normalized images than on images in [0, 1].",
        "Move the normalization into the model, so that the radius is in units of pixels.",
    ),
    "label_blind": Reading(
        "Equal images get different predictions, so the model knows labels from elsewhere.",
        "Look for state that depends on the position or number of an image.",
    ),
    "zero_gradients": Reading(
        "Many gradients are zero everywhere. Such an image never moves, whatever the attack.",
        "Look for rounding, saturation or a non-differentiable step. Believe AutoAttack's Square rather than PGD.",
    ),
    "large_eps": Reading(
        "An attack that may replace the whole image does not win, so it gets no useful gradient.",
        "Treat RA as unknown. Look for gradient masking and run AutoAttack.",
    ),
    "one_step": Reading(
        "One large step breaks more images than many small ones: the gradient misleads the attack.",
        "Give the attack more restarts and other step sizes, and run AutoAttack.",
    ),
    "converged": Reading(
        "As many steps again break more images.",
        "Evaluate again with twice as many steps, or with restarts.",
    ),
    "monotone_in_eps": Reading(
        "A larger radius leaves more images standing, which no sound attack does.",
        "Look for gradient masking and run AutoAttack.",
    ),
    "black_box": Reading(
        "Square, which sees no gradient, breaks images that all gradient attacks missed.",
        "Report the RA under AutoAttack and not the one under PGD.",
    ),
    "hidden_by_routing": Reading(
        "Attacks on the routing break images that PGD through the model's own gradient misses.",
        "Report the RA under the attacks on the routing, and for S-Dense the RA under as many further starts of PGD.",
    ),
}
"""Explanations by the name of the check."""


def failed_readings(diagnostics: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Reading]]:
    """Name and reading of each check of a card that failed."""
    for item in diagnostics:
        if item["status"] == "failed" and item["name"] in READINGS:
            yield item["name"], READINGS[item["name"]]
