"""The training methods by name. Each is one function of its levels and batches. The loop knows nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from advmoe.config import KINDS, Kind, MethodName, ModelConfig, TrainConfig, check
from advmoe.data.loader import Batch
from advmoe.models.masked import close_masks, open_masks
from advmoe.models.network import RoutedNetwork
from advmoe.training.coupling import expert_banks, expert_layers, rows_of_some
from advmoe.training.levels import Level, LevelName
from advmoe.training.schedule import Phase
from advmoe.training.steps import (
    StepResult,
    adversarial_update,
    attacked,
    part_of,
    robust_update,
    standard_update,
)

StepFunction = Callable[
    [Sequence[Level], Sequence[Batch | None], TrainConfig, Sequence[torch.Generator], int], Sequence[StepResult | None]
]
"""(levels, one batch and one generator of attack noise for each level, config, number of the
iteration) -> the result of each level's update, or None if a level was not updated. The last level
is always updated. The batch of another level is None where the method needs none (`Method.periods`)."""


def in_all_iterations(config: TrainConfig) -> tuple[int, ...]:
    """The one level of most methods has a batch in every iteration."""
    return (1,)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method. Level i is updated on the batches of random stream i."""

    levels: tuple[LevelName, ...]
    """The levels, which are optimized separately. The last one sets the length of an epoch."""
    step: StepFunction
    """One iteration."""
    periods: Callable[[TrainConfig], tuple[int, ...]] = in_all_iterations
    """For each level, the iterations in which the method needs a batch of its stream: every k-th; 0 is none."""
    kinds: tuple[Kind, ...] = KINDS
    """Model kinds for which the method is defined."""
    phases: tuple[Phase, ...] = (Phase(),)
    """Phases in their order. Only a checkpoint of the last phase can be a run's best, because the
    network differs before."""
    starts_from_checkpoint: bool = False
    """Whether it has to start from an earlier run."""
    summary: str

    @property
    def moves_experts(self) -> bool:
        """Whether it changes psi."""
        return bool({"experts", "all"} & set(self.levels))


def advmoe(
    levels: Sequence[Level],
    batches: Sequence[Batch | None],
    config: TrainConfig,
    noise: Sequence[torch.Generator],
    iteration: int,
) -> list[StepResult | None]:
    """Algorithm 1: two different batches, two attacks; the experts are attacked through the routers just updated.

    With `router_step` reuse, the routers learn from the images that were attacked for the experts
    one step before. The experts' step directly precedes the routers' step, so both are taken
    together, in the other order. The sequence of updates is the same, and no images have to be kept
    between iterations or in checkpoints.
    """
    routers, experts = levels
    batch_routers, batch_experts = batches
    assert batch_experts is not None
    due = iteration % config.router_every == 0
    lower: StepResult | None = None
    if config.router_step == "exact":
        if due:
            assert batch_routers is not None
            part, _ = part_of(batch_routers, config.router_share)
            lower = adversarial_update(routers, part, config, noise[0])
        upper = adversarial_update(experts, batch_experts, config, noise[1])
    else:
        adversarial = attacked(experts.model, batch_experts, config, noise[1])
        upper = robust_update(experts, batch_experts, adversarial, config)
        if due:
            part, rows = part_of(batch_experts, config.router_share)
            lower = robust_update(routers, part, adversarial._replace(images=adversarial.images[rows]), config)
    return [lower, upper]


def batches_of_routers(config: TrainConfig) -> tuple[int, ...]:
    """AdvMoE's routers have a batch of their own in every k-th iteration, or never if they reuse attacked images."""
    return config.router_every if config.router_step == "exact" else 0, 1


def adversarial_training(
    levels: Sequence[Level],
    batches: Sequence[Batch | None],
    config: TrainConfig,
    noise: Sequence[torch.Generator],
    iteration: int,
) -> list[StepResult]:
    """AT: the robust loss, by default TRADES, on the parameters of one level (eq. AT: on all of them jointly)."""
    (batch,) = batches
    assert batch is not None
    return [adversarial_update(levels[0], batch, config, noise[0])]


def standard(
    levels: Sequence[Level],
    batches: Sequence[Batch | None],
    config: TrainConfig,
    noise: Sequence[torch.Generator],
    iteration: int,
) -> list[StepResult]:
    """Cross-entropy on clean images."""
    (batch,) = batches
    assert batch is not None
    return [standard_update(levels[0], batch, config)]


HYDRA = (
    Phase(part="experts", begin=open_masks),
    Phase(part="masks", length=0.2, begin=close_masks),
    Phase(part="experts", peak=0.1),
)
"""AT (Sparse): all weights of Dense, then the masks alone, then the kept weights under fixed masks.

HYDRA (Sehwag et al., 2020) trains them for 100, 20 and 100 epochs from the rates 0.1, 0.1 and 0.01.
"""

METHODS: dict[MethodName, Method] = {
    "advmoe": Method(
        levels=("routers", "experts"),
        step=advmoe,
        periods=batches_of_routers,
        kinds=("moe",),
        summary="AdvMoE: routers and experts trained adversarially in turn (Algorithm 1)",
    ),
    "at": Method(
        levels=("all",), step=adversarial_training, summary="adversarial training (TRADES) of all parameters jointly"
    ),
    "at_sparse": Method(
        levels=("all",),
        step=adversarial_training,
        phases=HYDRA,
        kinds=("sparse_cnn",),
        summary="AT (Sparse): AT of Dense, then of its channel masks, then of the kept weights",
    ),
    "mask_at": Method(
        levels=("masks",),
        step=adversarial_training,
        kinds=("sparse_cnn",),
        starts_from_checkpoint=True,
        summary="AT of the channel masks alone, on the weights of a trained Dense (Fig. 3, M3)",
    ),
    "router_at": Method(
        levels=("routers",),
        step=adversarial_training,
        kinds=("moe",),
        starts_from_checkpoint=True,
        summary="router-only AT of a trained model, experts fixed (Sec. 4, Q1)",
    ),
    "expert_at": Method(
        levels=("experts",),
        step=adversarial_training,
        kinds=("moe", "sparse_cnn"),
        starts_from_checkpoint=True,
        summary="AT of the experts of a trained model, routers fixed (Sec. 4, Q2), or a Sparse-CNN, masks fixed",
    ),
    "standard": Method(levels=("all",), step=standard, summary="ordinary training on clean images"),
}


def resolve_method(name: MethodName, model: ModelConfig, *, has_init: bool = False) -> Method:
    """The method, checked against the model it is to train.

    Raises:
        ConfigError: The method is not defined for this kind of model.
    """
    method = METHODS[name]
    check(
        model.kind in method.kinds,
        f"method '{name}' trains model kind {' or '.join(method.kinds)}, got '{model.kind}'; "
        f"use method at for adversarial training of '{model.kind}'",
        "method",
    )
    check(
        has_init or not method.starts_from_checkpoint,
        f"method '{name}' goes on from a trained model; give its checkpoint",
        "init",
    )
    return method


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A reason why settings may do less than one expects."""

    warning: str
    advice: dict[str, Any]
    """Settings that would help, by name, with the value to try."""


def doubts(model: RoutedNetwork, config: TrainConfig) -> list[Doubt]:
    """The doubts about the settings of a run."""
    described, found = model.config, list[Doubt]()
    attacks = config.method != "standard"
    one_decision = described.several_experts and described.granularity == "image"
    if attacks and one_decision and config.attack_routing == "fixed":  # see docs/study.md
        found.append(
            Doubt(
                warning="one decision chooses the whole pathway, and the attack in training does not see it: such a "
                "network lost almost half of its RA to attacks on its routing; attack the routing in training, too",
                advice={"attack_routing": "mixture"},
            )
        )
    if attacks and config.loss == "trades" and config.attack.start == "clean":
        found.append(
            Doubt(
                warning="the attack in training starts at the clean image, where the KL divergence of TRADES has the "
                "gradient 0: its first step follows rounding errors; start beside the image",
                advice={"start": "gaussian"},
            )
        )
    couples = config.specialization is not None and METHODS[config.method].moves_experts
    differ = any(rows_of_some(layer.rows) for layer in expert_layers(model))
    if couples and differ and next(expert_banks(model), None) is None:
        found.append(
            Doubt(
                warning=f"specialization {config.specialization:g} has no effect: at N = {described.num_experts} and "
                f"r = {described.model_scale:g} no two filters have one place in the outputs of different experts, so "
                "that nothing can be coupled, and experts do not start equal; use a smaller r, or separate filters",
                advice={"expert_filters": "separate"},
            )
        )
    return found
