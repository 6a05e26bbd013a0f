"""What a run is, as plain data: the model, the attack, the training. Checkpoints store all of it as plain dicts."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from advmoe.errors import ConfigError

KINDS = ("dense", "s_dense", "sparse_cnn", "moe")
GRANULARITIES = ("layer", "block", "stage", "image", "token")
ROUTER_GRADIENTS = ("advantage", "softmax", "straight_through")
EXPERT_FILTERS = ("windows", "separate")
ROUTER_OPTIONS = ("num_experts", "granularity", "router_gradient", "expert_filters")
"""Fields of `ModelConfig` that mean something for kind `moe` only."""
LOSSES = ("trades", "pgd_at")
ROBUST_OPTIONS = ("loss", "trades_beta", "awp", "balance")
"""Fields of `TrainConfig` that mean nothing to method `standard`."""
ATTACK_STARTS = ("uniform", "gaussian", "clean")

T = TypeVar("T")


def one_of(what: str, value: str, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ConfigError: it is not; the message names the choices and the closest one.
    """
    known = sorted(choices)
    if value in known:
        return value
    close = difflib.get_close_matches(str(value).lower(), known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"unknown {what} '{value}', expected one of: {', '.join(known)}{hint}")


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_eps(eps: float) -> None:
    """Raise ConfigError unless eps is a radius in pixel units of [0, 1]."""
    if not 0.0 <= eps <= 1.0:
        hint = f"; did you mean {eps:g}/255?" if 1.0 < eps <= 255.0 else ""
        raise ConfigError(f"eps must be in [0, 1], the pixel range of the images, got {eps:g}{hint}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to rebuild a model."""

    arch: str
    """Backbone: a name known to `advmoe.models.registry`."""
    kind: str = "moe"
    """`dense` (the full CNN), `s_dense` (every width times r), `sparse_cnn` (a learned mask keeps r of the channels),
    `moe` (N experts per layer at scale r)."""
    num_classes: int = 10
    """Outputs of the classifier."""
    image_size: int = 32
    """Height and width of the images, in pixels."""
    width: float = 1.0
    """Channel multiplier of the backbone, before r; below 1 for small runs."""
    depth: int | None = None
    """Number of DenseNet's layers (None: 100 on small images, 121 on ImageNet) or of ViT's blocks (None: 12)."""
    growth: int | None = None
    """DenseNet: channels that each layer adds; None for 12 on small images and 32 on ImageNet."""
    num_experts: int = 2
    """N, experts per MoE layer."""
    model_scale: float = 0.5
    """r, share of a layer's channels that one expert owns."""
    expert_filters: str = "windows"
    """`windows`: experts are channel windows of the backbone (paper); `separate`: own filters each (released code)."""
    granularity: str = "layer"
    """What one router decides for: each `layer`, `block` or `stage`, the whole network (`image`), or in vit each
    `token` of a layer."""
    router_gradient: str = "advantage"
    """How gradients pass the argmax: by a softmax gate on what sets the chosen expert apart from the mean one
    (`advantage`), by one on its whole output (`softmax`), or `straight_through` to the chosen logit (released code)."""
    compact: bool = False
    """Sparse-CNN whose dropped channels have been removed (`advmoe.models.masked.compact`)."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from the images per colour channel, inside the model."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divides the centred images."""

    def __post_init__(self) -> None:
        one_of("model kind", self.kind, KINDS)
        one_of("router granularity", self.granularity, GRANULARITIES)
        one_of("router gradient", self.router_gradient, ROUTER_GRADIENTS)
        one_of("kind of expert filters", self.expert_filters, EXPERT_FILTERS)
        check(
            not self.compact or self.kind == "sparse_cnn", f"only a sparse_cnn can be compact, got kind '{self.kind}'"
        )
        check(self.num_classes >= 2, f"the number of classes must be at least 2, got {self.num_classes}")
        check(self.num_experts >= 1, f"the number of experts N must be at least 1, got {self.num_experts}")
        check(
            self.num_experts <= 255,
            f"the number of experts N must be at most 255, got {self.num_experts}; the paper uses 2 to 10",
        )
        check(
            0.0 < self.model_scale <= 1.0,
            f"model scale r must be in (0, 1], got {self.model_scale:g}; the paper's default is 0.5",
        )
        check(
            0.0 < self.width < math.inf,
            f"the width multiplier must be positive and finite, got {self.width:g}; 1 is the full backbone",
        )
        check(
            len(self.mean) == len(self.std) == 3 and all(0.0 < deviation < math.inf for deviation in self.std),
            f"expected 3 means and 3 positive standard deviations, got {self.mean} and {self.std}",
        )
        for name, value, archs in (
            ("depth", self.depth, ("densenet", "vit")),
            ("growth", self.growth, ("densenet",)),
            ("granularity token", self.granularity == "token" or None, ("vit",)),
        ):
            check(
                value is None or self.arch in archs,
                f"{name} is an option of {' and '.join(archs)}, not of {self.arch}",
            )
            check(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        check(self.image_size >= 8, f"images must be at least 8 pixels wide, got {self.image_size}")

    @property
    def several_experts(self) -> bool:
        """Whether there is a choice for routers to make: an MoE-CNN with N > 1."""
        return self.kind == "moe" and self.num_experts > 1


def model_config(**settings: Any) -> ModelConfig:
    """A model's description from the settings somebody asked for.

    Raises:
        ConfigError: a value that cannot be, or an option of routers for a kind that has none. (A config that was stored
            may hold such values: they were the defaults of its day, and mean nothing.)
    """
    config = ModelConfig(**settings)
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        check(
            config.kind == "moe" or option.name not in ROUTER_OPTIONS or value == option.default,
            f"{option.name} = {value} needs routers, which kind {config.kind} has not; leave it out or use kind moe",
        )
    return config


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """A PGD attack in the l-infinity ball; lengths in pixel units of [0, 1]."""

    eps: float = 8 / 255
    """Radius of the ball."""
    steps: int = 50
    """K, gradient steps."""
    step_size: float = 2 / 255
    """Length of a step."""
    restarts: int = 1
    """Independent starts; an image counts as robust if it survives them all."""
    start: str = "uniform"
    """`uniform` in the ball, `gaussian` (0.001 * N(0, I), as in TRADES) or `clean`."""

    def __post_init__(self) -> None:
        check_eps(self.eps)
        one_of("attack start", self.start, ATTACK_STARTS)
        check(self.steps >= 0, f"attack steps must not be negative, got {self.steps}")
        check(self.restarts >= 1, f"attack restarts must be at least 1, got {self.restarts}")
        check(
            0.0 <= self.step_size < math.inf,
            f"the attack's step size must be finite and not negative, got {self.step_size:g}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults are the paper's settings (Sec. 5.1, App. B) as far as they are known."""

    dataset: str
    """Name of the data set."""
    method: str = "advmoe"
    """A name known to `advmoe.training.methods`."""
    epochs: int = 100
    """Passes over the training images (of the experts' stream)."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.1
    """Peak learning rate of SGD, shared by routers and experts; follows a cosine to zero."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """L2 penalty."""
    loss: str = "trades"
    """Robust objective: `trades` (paper, eq. AT) or `pgd_at`, cross-entropy of adversarial images (Madry et al.)."""
    trades_beta: float = 6.0
    """1 / lambda, weight of the KL term."""
    specialisation: float | None = 0.25
    """Speed at which experts part from their common start (`advmoe.training.coupling`); None: nothing couples them."""
    balance: float = 0.0
    """Weight of the load-balance loss on the routers; 0 is off, as in the paper."""
    awp: float = 0.0
    """Size gamma of adversarial weight perturbations relative to the weights (Wu et al., 2020); 0 is off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and kept; 0 is off."""
    init: str | None = None
    """SHA-256 of the checkpoint the run starts from (as router-only AT does); None for fresh weights."""
    attack: AttackConfig = dataclasses.field(
        default_factory=lambda: AttackConfig(steps=2, step_size=5 / 255, start="gaussian")
    )
    """The attack that training defends against."""
    val_attack: AttackConfig = dataclasses.field(default_factory=lambda: AttackConfig(steps=10))
    """The attack that selects `best.pt` on the validation split."""
    val_fraction: float = 0.1
    """Share of the training images held out for validation."""
    val_limit: int = 1000
    """Validation images attacked after each epoch, at most."""
    flip: bool = True
    """Mirror half of the training images; off where a mirrored image is another class (digits)."""
    limit_train: int | None = None
    """Use only this many training images (a seeded choice); None for all."""
    skip_bad_images: bool = False
    """Leave out images that cannot be decoded, and count them, instead of stopping at the first one."""
    seed: int = 0
    """Seed of initial weights, splits, batches and attacks."""

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        check(self.batch_size >= 2, f"batch size must be at least 2 (BatchNorm), got {self.batch_size}")
        check(0.0 < self.lr < math.inf, f"the learning rate must be positive and finite, got {self.lr:g}")
        check(0.0 <= self.momentum < 1.0, f"momentum must be in [0, 1), got {self.momentum:g}")
        check(
            0.0 <= self.weight_decay < math.inf,
            f"weight decay must be finite and not negative, got {self.weight_decay:g}",
        )
        one_of("loss", self.loss, LOSSES)
        check(
            self.specialisation is None or 0.0 <= self.specialisation < math.inf,
            f"specialisation must be finite and not negative, got {self.specialisation}; the default is 0.25",
        )
        check(self.balance >= 0, f"the weight of the load-balance loss must not be negative, got {self.balance:g}")
        check(0.0 <= self.awp < 1.0, f"awp (gamma) must be in [0, 1), got {self.awp:g}; the usual value is 0.005")
        check(
            self.ema == 0 or self.method != "at_sparse",
            "ema would average the different networks of at_sparse's phases; leave it off",
        )
        check(0.0 <= self.ema < 1.0, f"ema (decay) must be in [0, 1), got {self.ema:g}; the usual value is 0.999")
        check(
            0.0 <= self.trades_beta < math.inf,
            f"trades_beta (1/lambda) must be finite and not negative, got {self.trades_beta:g}",
        )
        check(0.0 < self.val_fraction < 1.0, f"the validation share must be in (0, 1), got {self.val_fraction:g}")
        check(self.val_limit >= 1, f"val_limit must be at least 1, got {self.val_limit}")
        check(
            self.limit_train is None or self.limit_train >= self.batch_size,
            f"--limit-train must be at least one batch ({self.batch_size}), got {self.limit_train}",
        )
        check(0 <= self.seed < 2**63, f"the seed must be in [0, 2^63), got {self.seed}")
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            unused = option.name in ROBUST_OPTIONS and self.method == "standard"
            unused |= option.name == "trades_beta" and self.loss != "trades"
            check(
                not unused or value == option.default,
                f"{option.name} = {value} has no effect on method {self.method} with loss {self.loss}; leave it out",
            )


def check_together(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ConfigError where a training asks for what the model has not."""
    check(
        model.several_experts or train.balance == 0,
        f"balance = {train.balance:g} needs routers with a choice; leave it out or use kind moe with 2 experts or more",
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values (what `json` and `torch.load(weights_only=True)` accept)."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; unknown fields are an error, because ignoring them would change what the run means.

    Raises:
        ConfigError: an unknown field, or a value the config refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    check(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; was this written by a newer version?")
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name in {"attack", "val_attack"}:
            converted[name] = from_dict(AttackConfig, value)
        else:
            converted[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**converted)
    except TypeError as error:
        raise ConfigError(f"not a valid {cls.__name__}: {error}") from error


def difference(given: Any, wanted: Any) -> str:
    """The first field in which two configs differ, as `name = given (not wanted)`."""
    pairs = zip(to_dict(given).items(), to_dict(wanted).values(), strict=True)
    return next((f"{name} = {value} (not {other})" for (name, value), other in pairs if value != other), "nothing")
