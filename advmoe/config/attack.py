"""PGD attacks as plain data: in training, in validation and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from advmoe.schema import Setting, Settings, check

AttackStart = Literal["uniform", "gaussian", "clean"]


def check_eps(eps: float, setting: str = "eps") -> None:
    """Check that eps is a radius in pixel units of [0, 1].

    Args:
        eps: The radius.
        setting: Name of the setting that it comes from.

    Raises:
        ConfigError: eps is outside [0, 1].
    """
    if not 0.0 <= eps <= 1.0:
        hint = f"; did you mean {eps:g}/255?" if 1.0 < eps <= 255.0 and eps == round(eps) else ""
        check(False, f"eps must be in [0, 1], the pixel range of the images, got {eps:g}{hint}", setting)


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Settings):
    """A PGD attack in the l-infinity ball; lengths in pixel units of [0, 1]."""

    eps: Annotated[float, Setting("Radius of the ball.")] = 8 / 255
    steps: Annotated[
        int, Setting("K, gradient steps.", noun="the number of attack steps", at_least=0, at_most=10**6)
    ] = 50
    step_size: Annotated[float, Setting("Length of a step.", noun="the attack's step size", at_least=0.0)] = 2 / 255
    restarts: Annotated[
        int,
        Setting(
            "Independent starts; an image counts as robust if it survives them all.",
            noun="the number of attack restarts",
            at_least=1,
            at_most=10**6,
        ),
    ] = 1
    start: Annotated[
        AttackStart,
        Setting(
            "uniform in the ball, gaussian (0.001 * N(0, I), as in TRADES) or clean (further restarts: uniform).",
            noun="attack start",
        ),
    ] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.eps)


@dataclass(frozen=True, kw_only=True)
class TrainingAttack(Settings):
    """Settings of the attack in training. The radius usually comes from the data set."""

    panel: ClassVar[str] = "Attack in training"

    eps: Annotated[float, Setting("Radius in [0, 1], e.g. 8/255.", default="the data set's, 8/255 for CIFAR")] = 8 / 255
    steps: Annotated[int, Setting("K, PGD steps.", noun="the number of attack steps", at_least=0, at_most=10**6)] = 2
    step_size: Annotated[
        float | None,
        Setting("Length of a step.", noun="the attack's step size", at_least=0.0, default="5/8 of eps"),
    ] = None
    start: Annotated[
        AttackStart,
        Setting(
            "Start of the attack: gaussian (0.001 * N(0, I), as in TRADES), uniform or clean.", noun="attack start"
        ),
    ] = "gaussian"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.eps)

    def in_training(self) -> AttackConfig:
        """The attack that training defends against."""
        step_size = 5 / 8 * self.eps if self.step_size is None else self.step_size
        return AttackConfig(eps=self.eps, steps=self.steps, step_size=step_size, start=self.start)

    def in_validation(self) -> AttackConfig:
        """The attack that selects the best checkpoint: the same radius, ten steps, each a quarter
        of the radius long.
        """
        return AttackConfig(eps=self.eps, steps=10, step_size=self.eps / 4)
