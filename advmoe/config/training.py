"""The training as plain data: schedule, objective, router step and images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from advmoe.config.attack import AttackConfig, TrainingAttack
from advmoe.config.model import ModelConfig
from advmoe.schema import Setting, Settings, check, check_unused, fields_of

MethodName = Literal["advmoe", "at", "at_sparse", "mask_at", "router_at", "expert_at", "standard"]
Loss = Literal["trades", "pgd_at"]
RouterStatistics = Literal["stored", "batch"]
RouterStep = Literal["exact", "reuse"]
Precision = Literal["fp32", "bf16_attack", "bf16"]
Dispatch = Literal["auto", "tiles"]
Compile = Literal["off", "kernels", "graphs"]
AttackRouting = Literal["fixed", "mixture", "margin"]
Upcycling = Literal["copies", "windows"]

CHECKPOINT_MINUTES = 10.0
"""Minutes between checkpoints in mid-epoch by default: the work that a crash may cost."""


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
            default="0.1; for folder smaller in proportion to a batch size below 64",
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
    upcycling: Annotated[
        Upcycling,
        Setting(
            "How experts start from a Dense: each as a copy of its largest channels (copies), or each with the "
            "channels that its own window has in the Dense (windows), so that both share an order of channels. MoE-ViT "
            "always has windows.",
            noun="upcycling",
        ),
    ] = "copies"
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
            self.upcycling == "copies" or self.init is not None,
            f"upcycling {self.upcycling} has no effect on fresh weights; leave it out, or start from a Dense",
            "upcycling",
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
