"""The model as plain data: its backbone, its experts and its routers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypedDict, get_args

from advmoe.errors import ConfigError
from advmoe.schema import Setting, Settings, check, check_unused, closest, fields_of, from_dict

Arch = Literal["densenet", "resnet18", "vgg16", "vit", "wrn28_10"]
Kind = Literal["dense", "s_dense", "sparse_cnn", "moe"]
Granularity = Literal["layer", "block", "stage", "image", "token"]
RouterGradient = Literal["advantage", "softmax", "straight_through", "dense", "sampled", "relative", "value"]
ExpertFilters = Literal["windows", "separate"]
Triple = tuple[float, float, float]

KINDS: tuple[Kind, ...] = get_args(Kind)
ROUTER_GRADIENTS: tuple[RouterGradient, ...] = get_args(RouterGradient)


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
        Arch,
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
            "What the expert chosen is compared with: all others (dense; relative: in mean differences), another in "
            "turn (sampled), the mean (advantage), nothing (softmax, straight_through). value: as in Switch.",
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
            without routers, or the model scale for a Dense. (A stored config may hold such values:
            they were defaults then, and have no effect.)
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
    if config.kind == "dense":
        check_unused(config, "model_scale", "kind dense, which is the full network", " or use kind s_dense")
    return config
