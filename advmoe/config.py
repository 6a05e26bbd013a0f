"""A run as plain data: the model, the attack, the training. Checkpoints store all of it as plain dicts.

Each part of the system has its own class here. `ModelConfig` and `TrainConfig` inherit from these
classes, so a part can take the whole configuration and read its own fields. To add an option, add a
field. The library checks its type and bounds, checkpoints store it, and the command line offers it
with its help and default.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypedDict, get_args

from advmoe.errors import ConfigError
from advmoe.schema import Setting, Settings, check, closest, difference, fields_of, from_dict, one_of, to_dict

__all__ = [
    "AttackConfig",
    "ModelConfig",
    "ModelSettings",
    "TrainConfig",
    "check",
    "check_eps",
    "check_together",
    "difference",
    "from_dict",
    "model_config",
    "one_of",
    "to_dict",
]

Kind = Literal["dense", "s_dense", "sparse_cnn", "moe"]
Granularity = Literal["layer", "block", "stage", "image", "token"]
RouterGradient = Literal["advantage", "softmax", "straight_through", "dense", "sampled", "relative", "value"]
ExpertFilters = Literal["windows", "separate"]
MethodName = Literal["advmoe", "at", "at_sparse", "mask_at", "router_at", "expert_at", "standard"]
Loss = Literal["trades", "pgd_at"]
RouterStatistics = Literal["stored", "batch"]
RouterStep = Literal["exact", "reuse"]
Precision = Literal["fp32", "bf16_attack", "bf16"]
Dispatch = Literal["auto", "tiles"]
Compile = Literal["off", "kernels", "graphs"]
AttackRouting = Literal["fixed", "mixture", "margin"]
AttackStart = Literal["uniform", "gaussian", "clean"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ROUTER_GRADIENTS: tuple[RouterGradient, ...] = get_args(RouterGradient)

CHECKPOINT_MINUTES = 10.0
"""Minutes between checkpoints in mid-epoch by default: the work that a crash may cost."""

Triple = tuple[float, float, float]


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


def check_unused(config: Settings, name: str, place: str, remedy: str = "") -> None:
    """Refuse a setting that differs from its default, because nothing would read it.

    Args:
        config: The configuration that has the setting.
        name: Name of the setting.
        place: The place where the setting has no effect, for the message.
        remedy: An alternative to leaving the setting out, for the message.

    Raises:
        ConfigError: The setting differs from its default.
    """
    (default,) = (field.default for field in fields_of(type(config)) if field.name == name)
    value = getattr(config, name)
    check(value == default, f"{name} {value} has no effect on {place}; leave it out{remedy}", name)


def routed_part(routed: str) -> tuple[str, int] | None:
    """The kind of part ("stage" or "block") and the number of last parts that are routed; None for
    the whole backbone.

    Raises:
        ConfigError: The text is not `all`, `last-N-stages` or `last-N-blocks`.
    """
    if routed == "all":
        return None
    match = re.fullmatch(r"last-([1-9]\d{0,3})-(stage|block)s", routed)
    if match is None:
        check(False, f"the routed part must be all, last-N-stages or last-N-blocks, got '{routed}'", "routed")
    assert match is not None
    return match[2], int(match[1])


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Settings):
    """The backbone, without its routing."""

    panel: ClassVar[str] = "Model"

    arch: Annotated[
        str,
        Setting(
            "Backbone: vgg16, resnet18, wrn28_10, densenet or vit.",
            noun="architecture",
            default="vgg16; resnet18 for folder",
        ),
    ]
    kind: Annotated[
        Kind,
        Setting(
            "moe (N experts per layer at scale r), dense (the full network), s_dense (every width times r) or "
            "sparse_cnn (a learned mask keeps r of the channels).",
            noun="model kind",
        ),
    ] = "moe"
    num_classes: Annotated[
        int,
        Setting("Outputs of the classifier.", noun="the number of classes", at_least=2, at_most=10**6, option=False),
    ] = 10
    image_size: Annotated[
        int,
        Setting(
            "Height and width of the images in pixels; folder and imagenet are cut to it.",
            noun="the image size",
            at_least=8,
            at_most=4096,
            default="the data set's",
        ),
    ] = 32
    width: Annotated[
        float,
        Setting(
            "Channel multiplier of the backbone, before r; below 1 for small runs.",
            noun="the width multiplier",
            above=0.0,
            at_most=16.0,
            usual="1 is the full backbone",
            default="1; 0.25 for folder",
        ),
    ] = 1.0
    depth: Annotated[
        int | None,
        Setting(
            "Layers of densenet or blocks of vit.",
            at_least=1,
            at_most=1000,
            default="100 (121 for ImageNet); 12 in vit",
        ),
    ] = None
    growth: Annotated[
        int | None,
        Setting("Channels that each layer of densenet adds.", at_least=1, at_most=1000, default="12 (32 for ImageNet)"),
    ] = None
    model_scale: Annotated[
        float,
        Setting(
            "r, share of a layer's channels that one expert owns.",
            noun="model scale r",
            above=0.0,
            at_most=1.0,
            usual="the paper's default is 0.5",
        ),
    ] = 0.5
    compact: Annotated[
        bool,
        Setting("A Sparse-CNN whose dropped channels are removed (`advmoe.models.masked.compact`).", option=False),
    ] = False
    mean: Annotated[
        Triple, Setting("Subtracted from the images per color channel, inside the model.", option=False)
    ] = (0.0, 0.0, 0.0)
    std: Annotated[
        Triple, Setting("Divides the centered images.", noun="the standard deviation", above=0.0, option=False)
    ] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Settings):
    """The experts of an MoE layer."""

    panel: ClassVar[str] = "Experts and routers (kind moe)"

    num_experts: Annotated[
        int,
        Setting(
            "N, experts per MoE layer.",
            noun="the number of experts N",
            at_least=1,
            at_most=255,
            usual="the paper uses 2 to 10",
        ),
    ] = 2
    expert_filters: Annotated[
        ExpertFilters,
        Setting(
            "Experts are windows of the backbone's channels (paper), or have separate filters (released code).",
            noun="kind of expert filters",
        ),
    ] = "windows"
    shared: Annotated[
        float,
        Setting(
            "Share of a pathway's filters that all experts of a layer have in common (a shared expert).",
            noun="the shared part of an expert",
            at_least=0.0,
            at_most=1.0,
        ),
    ] = 0.0
    expert_affine: Annotated[
        bool,
        Setting("Give every expert a scale and a shift of its own for each filter; they cost nothing in the end."),
    ] = False
    routed: Annotated[
        str,
        Setting(
            "Which part of the backbone has MoE layers: all, last-N-stages or last-N-blocks; the rest is S-Dense's.",
            noun="the routed part",
        ),
    ] = "all"


@dataclass(frozen=True, kw_only=True)
class RoutersConfig(Settings):
    """The routers of an MoE-CNN."""

    panel: ClassVar[str] = "Experts and routers (kind moe)"

    granularity: Annotated[
        Granularity,
        Setting(
            "What one router decides for: each layer, block or stage, the whole network (image), or each token (vit).",
            noun="router granularity",
        ),
    ] = "layer"
    router_gradient: Annotated[
        RouterGradient,
        Setting(
            "What the expert chosen is compared with: the best other (dense; relative: in mean differences), another "
            "in turn (sampled), the mean (advantage), nothing (softmax, straight_through). value: as in Switch.",
            noun="router gradient",
        ),
    ] = "dense"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(RoutersConfig, ExpertsConfig, BackboneConfig):
    """Everything needed to rebuild a model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.compact or self.kind == "sparse_cnn", f"only a sparse_cnn can be compact, got kind '{self.kind}'"
        )
        for name, used, archs in (
            ("depth", self.depth is not None, ("densenet", "vit")),
            ("growth", self.growth is not None, ("densenet",)),
            ("granularity", self.granularity == "token", ("vit",)),
        ):
            check(
                not used or self.arch in archs,
                f"{name} {getattr(self, name)} is an option of {' and '.join(archs)}, not of {self.arch}",
                name,
            )

        check(
            not self.expert_affine or self.arch != "vit",
            "expert_affine is an option of the CNNs, not of vit, whose experts have output weights of their own",
            "expert_affine",
        )
        check(
            not (self.arch == "vit" and self.several_experts and self.model_scale == 1.0)
            or self.expert_filters != "windows",
            f"vit with {self.num_experts} experts at r = 1 is not its backbone: each expert has output weights of its "
            "own; use r below 1, one expert, or kind dense",
            "model_scale",
        )
        routed_part(self.routed)
        check(
            self.shared < 1.0 or self.expert_affine or self.num_experts == 1 or self.arch == "vit",
            "shared 1 leaves nothing that sets the experts apart; share less, or set expert_affine",
            "shared",
        )

    @property
    def several_experts(self) -> bool:
        """Whether the routers have a choice: an MoE-CNN with N > 1."""
        return self.kind == "moe" and self.num_experts > 1


class ModelSettings(TypedDict, total=False):
    """The settings that `create_model` takes besides the name of the backbone: the fields of `ModelConfig`.

    Editors and type checkers read the names and types here; a test keeps them equal to the fields.
    """

    kind: Kind
    num_classes: int
    image_size: int
    width: float
    depth: int | None
    growth: int | None
    model_scale: float
    compact: bool
    mean: Triple
    std: Triple
    num_experts: int
    expert_filters: ExpertFilters
    shared: float
    expert_affine: bool
    routed: str
    granularity: Granularity
    router_gradient: RouterGradient


def model_config(**settings: Any) -> ModelConfig:
    """A model's configuration from the settings that a user gave.

    Raises:
        ConfigError: A value is invalid, or a setting of routers differs from its default for a kind
            without routers. (A stored config may hold such values: they were defaults then, and
            have no effect.)
    """
    known = [field.name for field in fields_of(ModelConfig)]
    for name in settings:
        if name not in known:
            hint = closest(name, known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"a model has no setting '{name}'{hint}")
    config = from_dict(ModelConfig, settings)
    if config.kind != "moe":
        for field in (*fields_of(ExpertsConfig), *fields_of(RoutersConfig)):
            check_unused(config, field.name, f"kind {config.kind}, which has no routers", " or use kind moe")
    return config


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
        Setting("uniform in the ball, gaussian (0.001 * N(0, I), as in TRADES) or clean.", noun="attack start"),
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


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """Length of the training, learning rates and weights."""

    panel: ClassVar[str] = "Training"

    method: Annotated[
        MethodName,
        Setting(
            "Training method.",
            noun="training method",
            default="advmoe for moe, at_sparse for sparse_cnn, at for dense and s_dense",
        ),
    ] = "advmoe"
    epochs: Annotated[
        int,
        Setting(
            "Passes over the training images (of the experts' stream). AT (Sparse) takes so many for Dense and for the "
            "kept weights, and a fifth for the masks.",
            at_least=1,
            at_most=10**6,
        ),
    ] = 100
    batch_size: Annotated[
        int,
        Setting(
            "Images per step.",
            noun="the batch size",
            at_least=2,
            at_most=2**20,
            usual="BatchNorm needs two images or more",
            default="128; for folder 64 or what its number of images allows",
        ),
    ] = 128
    accumulate: Annotated[
        int,
        Setting(
            "Compute each batch in so many parts, one after another, so that it fits into memory; a step follows on "
            "all of them. BatchNorm normalizes by one part.",
            noun="the number of parts of a batch",
            at_least=1,
            at_most=2**19,
        ),
    ] = 1
    lr: Annotated[
        float,
        Setting(
            "Peak learning rate of SGD, shared by routers and experts; follows a cosine to zero.",
            noun="the learning rate",
            above=0.0,
        ),
    ] = 0.1
    precision: Annotated[
        Precision,
        Setting(
            "Arithmetic of convolutions in training: fp32, bf16_attack (bf16 in the attack alone) or bf16. Routers, "
            "losses and statistics stay fp32, and so does every validation and evaluation. bf16 is fast on GPUs and on "
            "CPUs with avx512_bf16 or amx.",
            noun="precision",
        ),
    ] = "fp32"
    compile: Annotated[
        Compile,
        Setting(
            "Whether the network's passes in training are compiled: off, kernels (fewer and fused ones) or graphs "
            "(of kernels that a GPU starts together). All N experts are then computed, and one is selected. It takes "
            "a minute or more at the start.",
            noun="compile",
        ),
    ] = "off"
    dispatch: Annotated[
        Dispatch,
        Setting(
            "How MoE convolutions bring images and experts together in training: auto, or tiles (a Triton kernel that "
            "looks up the expert of each tile of an image; needs a GPU, and none has shown yet that it is faster).",
            noun="dispatch",
        ),
    ] = "auto"
    router_lr: Annotated[
        float | None,
        Setting(
            "Peak learning rate of the routers; follows the same schedule.",
            noun="the routers' learning rate",
            above=0.0,
            default="that of the experts, as in the paper",
        ),
    ] = None
    momentum: Annotated[float, Setting("SGD momentum.", at_least=0.0, below=1.0)] = 0.9
    weight_decay: Annotated[float, Setting("L2 penalty.", noun="weight decay", at_least=0.0)] = 5e-4
    ema: Annotated[
        float,
        Setting(
            "Decay of a moving average of the weights, which is then validated and kept; 0 is off.",
            noun="ema (decay)",
            at_least=0.0,
            below=1.0,
            usual="the usual value is 0.999",
        ),
    ] = 0.0
    specialization: Annotated[
        float | None,
        Setting(
            "How fast experts grow apart from their common start; none: nothing couples them.",
            at_least=0.0,
            usual="the default is 0.25",
        ),
    ] = 0.25
    reinitialize: Annotated[
        float,
        Setting(
            "Share of every expert's own filters that are drawn anew where experts start from a model without them.",
            at_least=0.0,
            at_most=1.0,
        ),
    ] = 0.0
    init: Annotated[
        str | None,
        Setting("SHA-256 of the checkpoint the run starts from (as router-only AT does).", option=False),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """The loss of adversarial training. Method `standard` uses none of these settings."""

    panel: ClassVar[str] = "Objective"

    loss: Annotated[
        Loss,
        Setting("Robust objective: trades (paper) or pgd_at, cross-entropy of adversarial images (Madry et al.)."),
    ] = "trades"
    trades_beta: Annotated[float, Setting("1/lambda, weight of the KL term of TRADES.", at_least=0.0)] = 6.0
    attack_routing: Annotated[
        AttackRouting,
        Setting(
            "What the attack in training sees of the routing: nothing (fixed), the experts mixed by the routers' "
            "probabilities (mixture), or the routers' margins, which it lowers too (margin).",
        ),
    ] = "fixed"
    balance: Annotated[
        float,
        Setting(
            "Weight of a load-balance loss on the routers; 0 is off, as in the paper.",
            noun="the weight of the load-balance loss",
            at_least=0.0,
        ),
    ] = 0.0
    awp: Annotated[
        float,
        Setting(
            "Size gamma of adversarial weight perturbations relative to the weights (Wu et al., 2020); 0 is off.",
            noun="awp (gamma)",
            at_least=0.0,
            below=1.0,
            usual="the usual value is 0.005",
        ),
    ] = 0.0


@dataclass(frozen=True, kw_only=True)
class RouterStepConfig(Settings):
    """Settings of AdvMoE's lower level, the routers' step. The defaults are Algorithm 1; other values cost less."""

    panel: ClassVar[str] = "Router step (method advmoe)"

    router_step: Annotated[
        RouterStep,
        Setting(
            "exact: routers have a batch and an attack of their own (Algorithm 1); reuse: they learn from the images "
            "just attacked for the experts, which costs no attack.",
            noun="router step",
        ),
    ] = "exact"
    router_share: Annotated[
        float, Setting("Share of the batch that the router step sees.", noun="the share", above=0.0, at_most=1.0)
    ] = 1.0
    router_every: Annotated[
        int, Setting("Routers take a step in every k-th iteration only.", at_least=1, at_most=10**6)
    ] = 1
    router_statistics: Annotated[
        RouterStatistics,
        Setting(
            "What feature maps are normalized by in the router step: stored statistics, as at inference, or those of "
            "the batch, as in the experts' step.",
            noun="statistics of the router step",
        ),
    ] = "stored"


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Settings):
    """The images of a run, and their augmentation."""

    panel: ClassVar[str] = "Images"

    dataset: Annotated[str, Setting("Name of the data set.", option=False)]
    val_fraction: Annotated[
        float,
        Setting(
            "Share of the training images held out for validation.",
            noun="the validation share",
            above=0.0,
            below=1.0,
        ),
    ] = 0.1
    val_limit: Annotated[
        int, Setting("Validation images attacked after each epoch, at most.", at_least=1, at_most=10**9)
    ] = 1000
    flip: Annotated[
        bool,
        Setting("Mirror half of the training images.", default="on, but off where a mirrored image changes its class"),
    ] = True
    limit_train: Annotated[
        int | None,
        Setting("Train on this many images only (a seeded choice).", at_least=1, at_most=10**9, default="all"),
    ] = None
    skip_bad_images: Annotated[
        bool,
        Setting("Leave out images that cannot be decoded, and count them, instead of stopping at the first one."),
    ] = False
    seed: Annotated[
        int,
        Setting(
            "Seed of initial weights, splits, batches and attacks.", noun="the seed", at_least=0, at_most=2**63 - 1
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ImagesConfig, RouterStepConfig, ObjectiveConfig, ScheduleConfig):
    """One training run. The defaults are the paper's settings (Sec. 5.1, App. B) as far as they are known."""

    attack: Annotated[AttackConfig, Setting("The attack that training defends against.", option=False)] = (
        dataclasses.field(default_factory=lambda: TrainingAttack().in_training())
    )
    val_attack: Annotated[
        AttackConfig, Setting("The attack that selects `best.pt` on the validation split.", option=False)
    ] = dataclasses.field(default_factory=lambda: TrainingAttack().in_validation())

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.ema == 0 or self.method != "at_sparse",
            "ema would average the different networks of at_sparse's phases; leave it off",
            "ema",
        )
        seen = round(self.router_share * self.batch_size) if self.method == "advmoe" else self.batch_size
        check(
            self.accumulate == 1 or seen >= 2 * self.accumulate,
            f"accumulate {self.accumulate} divides the {seen} images of a step into parts of fewer than 2, which are "
            "too few for BatchNorm; use fewer parts or a larger batch",
            "accumulate",
        )
        check(
            self.accumulate == 1 or self.compile != "graphs",
            f"compile graphs overwrites the gradients that accumulate {self.accumulate} adds up; use compile kernels",
            "compile",
            "accumulate",
        )
        for name, value in (("awp", self.awp), ("balance", self.balance)):
            check(
                self.accumulate == 1 or value == 0,
                f"{name} {value:g} looks at a whole batch at once, but accumulate {self.accumulate} computes it in "
                "parts; leave out one of them",
                "accumulate",
                name,
            )
        check(
            self.limit_train is None or self.limit_train >= self.batch_size,
            f"limit_train must be at least one batch ({self.batch_size}), got {self.limit_train}",
            "limit_train",
        )
        check(
            self.reinitialize == 0 or self.init is not None,
            f"reinitialize {self.reinitialize:g} has no effect on fresh weights; leave it out, or start from a "
            "checkpoint of S-Dense, Dense or Sparse-CNN",
            "reinitialize",
        )
        for field in fields_of(ObjectiveConfig):
            if self.method == "standard" or (field.name == "trades_beta" and self.loss != "trades"):
                check_unused(self, field.name, "method standard" if self.method == "standard" else f"loss {self.loss}")
        check(
            self.precision != "bf16_attack" or self.method != "standard",
            "precision bf16_attack has no effect on method standard, which does not attack; leave it out or use bf16",
            "precision",
        )
        check(
            self.dispatch == "auto" or self.compile == "off",
            f"dispatch {self.dispatch} has no effect on passes that are compiled; leave one of them out",
            "dispatch",
            "compile",
        )
        if self.method != "advmoe":
            place = f"method {self.method}, which has no router step of its own"
            for field in fields_of(RouterStepConfig):
                check_unused(self, field.name, place, " or use method advmoe")


def check_together(model: ModelConfig, train: TrainConfig) -> None:
    """Check that the model has everything that the training needs.

    Raises:
        ConfigError: The model lacks something that a setting of the training needs.
    """
    check(
        model.several_experts or train.attack_routing == "fixed",
        f"attack_routing {train.attack_routing} needs routers with a choice; leave it out or use kind moe with 2 "
        "experts or more",
        "attack_routing",
    )
    check(
        train.dispatch == "auto" or (model.kind == "moe" and model.arch != "vit"),
        f"dispatch {train.dispatch} is for routed convolutions; leave it out or use kind moe and a CNN",
        "dispatch",
    )
    check(
        train.router_lr is None or (model.several_experts and train.method != "expert_at"),
        f"router_lr {train.router_lr} needs routers that learn a choice; leave it out or use kind moe with 2 experts "
        "or more, and a method that trains routers",
        "router_lr",
    )
    check(
        train.balance == 0 or (model.several_experts and train.method != "expert_at"),
        f"balance {train.balance:g} needs routers that learn a choice; leave it out or use kind moe with 2 experts or "
        "more, and a method that trains routers",
        "balance",
    )
    check(
        train.awp == 0 or train.method != "mask_at",
        f"awp {train.awp:g} perturbs filters, and mask_at trains none; leave it out",
        "awp",
    )
    check(
        train.router_statistics == "stored" or model.arch != "vit",
        f"router_statistics {train.router_statistics} is about BatchNorm, which a vit does not have; leave it out",
        "router_statistics",
    )
