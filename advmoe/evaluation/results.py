"""What an evaluation measures, and what comes out of it: one row per image, from which all figures are computed.

Attacks by name, each a column `robust/NAME`, true where the image is classified correctly, when clean and attacked:

- `pgd`: untargeted PGD on the model as it is (RA);
- `view/V`: the same through each gradient of the routing (`advmoe.attacks.relaxations`);
- `route`: pathways searched for what the above left (`advmoe.attacks.pathways`);
- `experts` (RA-E): the clean pathway frozen; `routers` (RA-R): only the routers attacked;
- `every_pathway/clean`, `every_pathway`: right on each of the pathways in use, without and with an attack on each;
- `autoattack/A`: after each of AutoAttack's four;
- `eps/E`: PGD at other radii;
- `worst`: everything that was found on the model itself at the full radius, together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from advmoe.attacks.pathways import RouteAttackConfig
from advmoe.attacks.relaxations import TEMPERATURES
from advmoe.config import AttackConfig, check, check_eps
from advmoe.evaluation.diagnostics import Diagnostic
from advmoe.evaluation.state import Arrays


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What is measured."""

    attack: AttackConfig
    """The PGD attack of RA; its radius, steps and start are those of all attacks here."""
    routing: bool = True
    """Attack the routing too, where there is one."""
    autoattack: bool = False
    """Run AutoAttack."""
    eps_sweep: tuple[float, ...] = ()
    """Other radii for PGD, with the step size in proportion."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Of the mixture views."""
    route: RouteAttackConfig = dataclasses.field(default_factory=RouteAttackConfig)
    """How far the route attack searches."""
    pathways: int = 8
    """Most frequent clean pathways on which every image has to be right for `every_pathway`."""
    diagnosed: int = 100
    """Images that the diagnostics look at; 0 leaves them out."""
    square_queries: int = 500
    """Queries of the black-box diagnostic."""

    def __post_init__(self) -> None:
        for eps in self.eps_sweep:
            check_eps(eps)
        check(self.diagnosed >= 0, f"the number of images to diagnose must not be negative, got {self.diagnosed}")
        check(self.pathways >= 1, f"the number of pathways must be at least 1, got {self.pathways}")


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Outcome of a suite."""

    config: SuiteConfig
    seed: int
    arrays: Arrays
    """One row per image: `index`, `label`, `right`, `prediction/C`, `pathway/C` [L] for conditions C (`clean`, `pgd`,
    `worst`), `robust/NAME`, `flip_radius`."""
    diagnostics: tuple[Diagnostic, ...]
    exact_routes: bool
    """Whether the route attack tried every pathway there is."""
    pathways_used: int
    """Distinct pathways of the clean images; 1 without routing."""

    @property
    def images(self) -> int:
        """Images evaluated."""
        return len(self.arrays["index"])

    @property
    def attacks(self) -> list[str]:
        """Names of what was run."""
        return [name.removeprefix("robust/") for name in self.arrays if name.startswith("robust/")]

    @property
    def white_box(self) -> list[str]:
        """Names of the attacks on the model itself that see its gradient, at the full radius; AutoAttack's together."""
        return [
            name for name in self.attacks if name in {"pgd", "route", "autoattack/fab-t"} or name.startswith("view/")
        ]

    def robust(self, *names: str) -> np.ndarray:
        """Images that withstand all the attacks named, bool [n]."""
        masks = [self.arrays[f"robust/{name}"] for name in names]
        together: np.ndarray = np.logical_and.reduce(masks)
        return together

    @property
    def sa(self) -> float:
        """Share of clean images classified correctly."""
        return float(self.arrays["right"].mean())

    def ra(self, *names: str) -> float:
        """Share of images that withstand all the attacks named."""
        return float(self.robust(*names).mean())

    @property
    def ra_union(self) -> float:
        """Share that withstands PGD through every view of the routing."""
        return self.ra("pgd", *(name for name in self.attacks if name.startswith("view/")))
