"""Complete runs by name, one or more for each of the paper's tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from advmoe.errors import ConfigError
from advmoe.schema import closest

BACKBONES = ("resnet18", "wrn28_10", "vgg16", "densenet")
DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenet")

BASELINES = {
    "at-s-dense": ("s_dense", "at", "1: AT (S-Dense)"),
    "at-sparse": ("sparse_cnn", "at_sparse", "2: AT (Sparse)"),
    "at-moe": ("moe", "at", "3: AT (MoE)"),
    "at-dense": ("dense", "at", "4: AT (Dense)"),
    "advmoe": ("moe", "advmoe", "AdvMoE"),
}
"""Methods compared in Table 1: name -> (model kind, training method, name in the paper)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run: a data set, and the settings that differ from the defaults."""

    name: str
    shown_in: str
    """Table or figure of the paper."""
    summary: str
    dataset: str
    model: Mapping[str, Any]
    """Fields of `ModelConfig`."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig`."""
    attack: Mapping[str, Any] = field(default_factory=dict)
    """`eps`, `steps` or `step_size` of the attack in training, as `resolve` takes them."""
    starts_from: str | None = None
    """Recipe whose best checkpoint is the start of this run."""


def shown_in(recipe: Recipe) -> list[str]:
    """Tables and figures of a run, by the names that `advmoe reproduce` has for them: `table1`, `fig2`, `appc`."""
    return [place.lower().replace(".", "").replace(" ", "") for place in recipe.shown_in.split(", ")]


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: No recipe has this name.
    """
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"unknown recipe '{name}', 'advmoe recipes' lists the {len(known)} there are{closest(name, known)}"
        )
    return known[name]


def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order of the paper's tables and figures."""
    return {
        recipe.name: recipe
        for recipe in (*_table1(), *_fig3(), *_fig5(), *_fig6(), *_fig7(), *_fig8(), *_table3(), *_steps())
    }


def _table1() -> Iterator[Recipe]:
    """Table 1; its checkpoints also serve Table 2 (AutoAttack) and Figs. 2 and 7."""
    for dataset in DATASETS:
        for arch in BACKBONES:
            for name, (kind, method, title) in BASELINES.items():
                studied = (dataset, arch) == ("cifar10", "resnet18")
                figures = {
                    "Table 2": dataset.startswith("cifar") and arch in {"resnet18", "wrn28_10"},
                    "Fig. 2": studied and name in {"at-s-dense", "at-moe"},
                    "Fig. 7": studied and kind == "dense",  # r = 1, whatever N
                }
                yield Recipe(
                    name=f"table1-{dataset}-{arch}-{name}",
                    shown_in=", ".join(["Table 1", *(figure for figure, shown in figures.items() if shown)]),
                    summary=title,
                    dataset=dataset,
                    model={"arch": arch, "kind": kind},
                    train={"method": method},
                )


def _fig3() -> Iterator[Recipe]:
    """Fig. 3: router-only AT against standard MoE (M1), AT of S-Dense (M2) and of the mask alone (M3), over r."""
    yield Recipe(
        name="fig3-standard-dense",
        shown_in="Fig. 3",
        summary="standard training of the network whose masks M3 learns",
        dataset="cifar10",
        model={"arch": "resnet18", "kind": "dense"},
        train={"method": "standard"},
    )
    for scale in (0.2, 0.5, 0.8):
        base: dict[str, Any] = {"arch": "resnet18", "model_scale": scale}
        standard = f"fig3-standard-moe-r{scale:g}"
        moe = {**base, "kind": "moe"}
        yield Recipe(
            name=standard,
            shown_in="Fig. 3",
            summary=f"M1: standard training of MoE-CNN, r = {scale:g}",
            dataset="cifar10",
            model=moe,
            train={"method": "standard"},
        )
        yield Recipe(
            name=f"fig3-router-at-r{scale:g}",
            shown_in="Fig. 3, Fig. 4" if scale == 0.5 else "Fig. 3",
            summary=f"router-only AT of M1, r = {scale:g}",
            dataset="cifar10",
            model=moe,
            train={"method": "router_at"},
            starts_from=standard,
        )
        yield Recipe(
            name=f"fig3-at-s-dense-r{scale:g}",
            shown_in="Fig. 3",
            summary=f"M2: AT of S-Dense, r = {scale:g}",
            dataset="cifar10",
            model={**base, "kind": "s_dense"},
            train={"method": "at"},
        )
        yield Recipe(
            name=f"fig3-mask-at-r{scale:g}",
            shown_in="Fig. 3",
            summary=f"M3: robustness-aware mask on standard-trained weights, r = {scale:g}",
            dataset="cifar10",
            model={**base, "kind": "sparse_cnn"},
            train={"method": "mask_at"},
            starts_from="fig3-standard-dense",
        )


def _fig5() -> Iterator[Recipe]:
    yield Recipe(
        name="fig5-expert-at",
        shown_in="Fig. 5",
        summary="expert AT on top of router-only AT",
        dataset="cifar10",
        model={"arch": "resnet18", "kind": "moe"},
        train={"method": "expert_at"},
        starts_from="fig3-router-at-r0.5",
    )


def _fig6() -> Iterator[Recipe]:
    """Fig. 6: mask and MoE-CNN start from one Dense, and every expert with its own window of the channels.

    Networks that were trained separately have no common order of channels. The IoU of any pathway
    with the mask would then be that of two independent choices of channels: 1/3 at r = 0.5.
    """
    windows = {"upcycling": "windows"}
    for name, kind, train, summary in (
        ("at-sparse", "sparse_cnn", {"method": "mask_at"}, "AT of the mask on AT (Dense)"),
        ("at-moe", "moe", {"method": "at", **windows}, "AT (MoE) from AT (Dense)"),
        ("advmoe", "moe", {"method": "advmoe", **windows}, "AdvMoE from AT (Dense)"),
    ):
        yield Recipe(
            name=f"fig6-{name}",
            shown_in="Fig. 6",
            summary=summary,
            dataset="cifar10",
            model={"arch": "resnet18", "kind": kind},
            train=train,
            starts_from="table1-cifar10-resnet18-at-dense",
        )


def _fig7() -> Iterator[Recipe]:
    for experts in (2, 4, 6, 8, 10):
        for scale in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            yield Recipe(
                name=f"fig7-n{experts}-r{scale:g}",
                shown_in="Fig. 7",
                summary=f"AdvMoE, N = {experts}, r = {scale:g}",
                dataset="cifar10",
                model={"arch": "resnet18", "kind": "moe", "num_experts": experts, "model_scale": scale},
            )


def _fig8() -> Iterator[Recipe]:
    for arch in ("resnet18", "wrn28_10"):
        for scale in (0.2, 0.5, 0.8):
            for name, (kind, method, title) in BASELINES.items():
                if kind == "dense" and scale != 0.5:  # Dense has r = 1 in every experiment
                    continue
                yield Recipe(
                    name=f"fig8-{arch}-{name}" + ("" if kind == "dense" else f"-r{scale:g}"),
                    shown_in="Fig. 8",
                    summary=title + ("" if kind == "dense" else f", r = {scale:g}"),
                    dataset="cifar10",
                    model={"arch": arch, "kind": kind, "model_scale": scale},
                    train={"method": method},
                )


def _table3() -> Iterator[Recipe]:
    for name, method in (("at-moe", "at"), ("advmoe", "advmoe")):
        yield Recipe(
            name=f"table3-vit-{name}",
            shown_in="Table 3",
            summary=f"MoE-ViT, {'AT' if method == 'at' else 'AdvMoE'}",
            dataset="cifar10",
            # each token picks one of two MLPs of full size, as in the MoE-ViTs that Table 3 builds
            # on
            model={
                "arch": "vit",
                "kind": "moe",
                "granularity": "token",
                "model_scale": 1.0,
                "expert_filters": "separate",
            },
            train={"method": method, "lr": 0.05},
        )


def _steps() -> Iterator[Recipe]:
    for steps in (1, 2, 5, 10):
        yield Recipe(
            name=f"appc-steps{steps}",
            shown_in="App. C",
            summary=f"AdvMoE with {steps}-step PGD in training",
            dataset="cifar10",
            model={"arch": "resnet18", "kind": "moe"},
            attack={"steps": steps, "step_size": max(2 / 255, 10 / 255 / steps)},
        )
