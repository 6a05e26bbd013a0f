"""The settings of an evaluation, and its outcome: one row per image, from which all figures are computed.

Attacks by family (`advmoe.evaluation.vocabulary.Attack`). Each gives one bool per image, true where
the image is classified correctly both clean and attacked:

- `pgd`: untargeted PGD on the unmodified model;
- `view`: the same through each gradient of the routing (`advmoe.attacks.relaxations`);
- `route`: a search over pathways for the images that the above left (`advmoe.attacks.pathways`);
- `further`: for a network without routers, PGD from as many further starts as `view` and `route`
  make attempts on a routed one, for the images that `pgd` left;
- `experts` (RA-E): PGD with the clean pathway frozen; `routers` (RA-R): an attack on the routers
  only;
- `every_pathway`: right on each of the pathways in use, without (`clean`) and with an attack on
  each;
- `autoattack`: after each of AutoAttack's four attacks;
- `eps`: PGD at other radii;
- `worst`: every success on the model itself at the full radius, together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from advmoe.attacks.autoattack import STANDARD
from advmoe.attacks.pathways import RouteAttackConfig
from advmoe.attacks.relaxations import DETACHED, GATES, TEMPERATURES, is_routed, routing_views
from advmoe.config import AttackConfig, check, check_eps
from advmoe.evaluation.diagnostics import Diagnostic
from advmoe.evaluation.machine import Machine
from advmoe.evaluation.state import Arrays
from advmoe.evaluation.vocabulary import Attack, Family, pixels

PGD = Attack("pgd")
ROUTE = Attack("route")
FURTHER = Attack("further")
EXPERTS = Attack("experts")
ROUTERS = Attack("routers")
EVERY_PATHWAY_CLEAN = Attack("every_pathway", "clean")
EVERY_PATHWAY = Attack("every_pathway", "attacked")
WORST = Attack("worst")
CONDITIONS = ("clean", "pgd", "worst")
"""Conditions under which predictions and pathways are stored: clean, after the last step of PGD,
and at the worst case."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What is measured."""

    attack: AttackConfig
    """The PGD attack of RA. All attacks here use its radius, steps and start."""
    routing: bool = True
    """Whether to attack the routing as well. A model that does not route gets as many further starts
    of PGD instead, so that the RA of all models rests on as many attempts."""
    autoattack: bool = False
    """Run AutoAttack."""
    eps_sweep: tuple[float, ...] = ()
    """Other radii for PGD, with the step size in proportion."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Of the mixture views."""
    route: RouteAttackConfig = dataclasses.field(default_factory=RouteAttackConfig)
    """Limits of the route attack's search."""
    pathways: int = 8
    """Number of most frequent clean pathways on which an image has to be right for `every_pathway`."""
    diagnosed: int = 64
    """Number of images for the diagnostics; 0 leaves them out."""
    square_queries: int = 500
    """Queries of the black-box diagnostic."""

    def __post_init__(self) -> None:
        attack = self.attack
        moves = "expected an attack that moves the images, got"
        check(attack.eps == 0.0 or attack.steps >= 1, f"{moves} {attack.steps} steps; take 1 or more", "steps")
        check(
            attack.eps == 0.0 or attack.step_size > 0.0,
            f"{moves} steps of length {attack.step_size:g}; take a quarter of eps",
            "step_size",
        )
        for eps in self.eps_sweep:
            check_eps(eps, "eps_sweep")
        labels = [pixels(float(radius_name(eps))) for eps in self.eps_sweep]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        check(twice is None, f"the radii of a sweep must differ, got {twice} twice; leave one out", "eps_sweep")
        check(self.diagnosed >= 0, f"the number of images to diagnose must not be negative, got {self.diagnosed}")
        check(self.pathways >= 1, f"the number of pathways must be at least 1, got {self.pathways}")


def further_starts(config: SuiteConfig) -> int:
    """Number of attempts on each image that the views and the route attack make, and of the further
    starts of PGD that a model without routing gets.
    """
    views = len(GATES) + len(set(config.temperatures))
    return views * config.attack.restarts + config.route.attempts


def planned(config: SuiteConfig, model: nn.Module) -> tuple[Attack, ...]:
    """The attacks of an evaluation of this model, in their order."""
    attacks = [PGD]
    if config.routing and is_routed(model):
        attacks += [Attack("view", name) for name in routing_views(model, config.temperatures) if name != DETACHED]
        attacks += [ROUTE, EXPERTS, ROUTERS, EVERY_PATHWAY_CLEAN, EVERY_PATHWAY]
    elif config.routing:
        attacks.append(FURTHER)
    if config.autoattack:
        attacks += [Attack("autoattack", name) for name in STANDARD]
    return (*attacks, *(Attack("eps", radius_name(eps)) for eps in config.eps_sweep), WORST)


def radius_name(eps: float) -> str:
    """A radius in the names of results."""
    return f"{eps:.6g}"


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Outcome of a suite."""

    config: SuiteConfig
    seed: int
    attacks: tuple[Attack, ...]
    """What was run, see `planned`."""
    arrays: Arrays
    """One row per image: `index` (its number in the data set), `label`, `pixels` (their digest),
    `right`, `prediction/C` and `pathway/C` [L] for `CONDITIONS`, `flip_radius`, and a column for each attack."""
    diagnostics: tuple[Diagnostic, ...]
    all_routes_tried: bool
    """Whether the route attack made an attempt on every pathway there is. An attempt may fail, so
    its RA is an upper bound here too."""
    pathways_used: int
    """Distinct pathways of the clean images; 1 without routing."""
    machines: tuple[Machine, ...]
    """The machines that attacked, which need not include the one that finished the evaluation."""

    @property
    def images(self) -> int:
        """Images evaluated."""
        return len(self.arrays["index"])

    def ran(self, *families: Family) -> list[Attack]:
        """The attacks of these families."""
        return [attack for attack in self.attacks if attack.family in families]

    @property
    def table(self) -> list[Attack]:
        """The attacks behind the RA of a table: PGD for every model, the attacks on the routing for a
        routed one, and further starts of PGD for another.
        """
        return self.ran("pgd", "view", "route", "further")

    @property
    def white_box(self) -> list[Attack]:
        """Attacks on the model itself, at the full radius, that use its gradient. AutoAttack counts as one."""
        return [*self.table, *(attack for attack in self.ran("autoattack") if attack.detail == STANDARD[-2])]

    def robust(self, attacks: Iterable[Attack]) -> NDArray[np.bool_]:
        """Images that withstand all of these attacks, [n]."""
        together: NDArray[np.bool_] = np.logical_and.reduce([self.arrays[attack.column] for attack in attacks])
        return together

    @property
    def sa(self) -> float:
        """Share of clean images classified correctly."""
        return float(self.arrays["right"].mean())

    def ra(self, *attacks: Attack) -> float:
        """Share of images that withstand all of these attacks."""
        return float(self.robust(attacks).mean())
