"""Recipes: every run of the paper's tables and figures exists and can be resolved."""

import re

import pytest

from advmoe.config import AttackConfig
from advmoe.data.sources import dataset_info
from advmoe.errors import ConfigError
from advmoe.experiments import EXPERIMENTS
from advmoe.recipes import recipe, recipes, shown_in
from advmoe.settings import resolve
from advmoe.training.methods import resolve_method

RECIPES = recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_that_could_start(name: str) -> None:
    named = RECIPES[name]
    start = {} if named.starts_from is None else {"init": "0" * 64}
    model, config = resolve(dataset_info(named.dataset), named.model, {**named.train, **start}, **named.attack)
    resolve_method(config.method, model, has_init=named.starts_from is not None)
    assert named.starts_from is None or named.starts_from in RECIPES


def test_table1_compares_five_methods_on_four_backbones_and_four_data_sets() -> None:
    assert len([name for name in RECIPES if name.startswith("table1-")]) == 5 * 4 * 4


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_table_and_figure_has_runs(experiment: str) -> None:
    assert [r.name for r in RECIPES.values() if experiment in shown_in(r)]


def test_defaults_are_the_papers_settings() -> None:
    model, config = resolve(dataset_info("cifar10"), {"arch": "vgg16"}, {})
    assert (model.kind, model.num_experts, model.model_scale, model.granularity) == ("moe", 2, 0.5, "layer")
    assert (config.method, config.epochs, config.batch_size, config.lr) == ("advmoe", 100, 128, 0.1)
    assert (config.trades_beta, config.momentum, config.weight_decay) == (6.0, 0.9, 5e-4)
    # step sizes by eps: training 5/255 and validation 2/255 at 8/255
    assert config.attack == AttackConfig(eps=8 / 255, steps=2, step_size=5 / 255, start="gaussian")
    assert config.val_attack == AttackConfig(eps=8 / 255, steps=10, step_size=2 / 255)


def test_attacks_scale_with_the_data_sets_radius() -> None:
    # 2/255 on TinyImageNet: 5/8 and 1/4 of it
    _, config = resolve(dataset_info("tinyimagenet"), {"arch": "resnet18"}, {})
    assert config.attack.eps == 2 / 255
    assert config.attack.step_size == pytest.approx(1.25 / 255)
    assert config.val_attack.step_size == pytest.approx(0.5 / 255)


def test_dense_is_the_reference_of_figure_7() -> None:
    # 5 numbers of experts at 8 scales, and AT (Dense), which is r = 1 for all of them
    shown = [r for r in RECIPES.values() if "Fig. 7" in r.shown_in.split(", ")]
    assert len(shown) == 5 * 8 + 1
    assert [r.name for r in shown if r.model["kind"] == "dense"] == ["table1-cifar10-resnet18-at-dense"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("fig7-", "fig8-"))])
def test_figures_over_n_and_r_share_out_one_backbone(name: str) -> None:
    # Paper, Sec. 5: at r = 1 every pathway is the full backbone, whatever N. So experts are windows
    # also for N r > 1.
    model, config = resolve(dataset_info("cifar10"), RECIPES[name].model, RECIPES[name].train)
    assert model.expert_filters == "windows"
    assert config.specialization == 0.25


def test_recipes_over_the_steps_of_the_attack_keep_what_else_is_asked_of_it() -> None:
    named = recipe("appc-steps10")
    _, config = resolve(dataset_info("cifar10"), named.model, named.train, **named.attack)
    # ten steps that together go farther than eps: 10/255 at least, and no step below 2/255
    assert config.attack == AttackConfig(eps=8 / 255, steps=10, step_size=2 / 255, start="gaussian")
    _, config = resolve(dataset_info("cifar10"), named.model, named.train, **{**named.attack, "eps": 4 / 255})
    assert (config.attack.eps, config.attack.steps, config.val_attack.eps) == (4 / 255, 10, 4 / 255)


def test_an_unknown_recipe_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fig5-expert-at'"):
        recipe("fig5-expert")


def test_runs_are_what_their_names_say() -> None:
    # the paper's Table 1 and Figs. 3 and 5
    wanted = {
        "at-s-dense": ("s_dense", "at"),
        "at-sparse": ("sparse_cnn", "at_sparse"),
        "at-moe": ("moe", "at"),
        "at-dense": ("dense", "at"),
        "advmoe": ("moe", "advmoe"),
    }
    named = {
        f"table1-{data}-{arch}-{name}": what
        for data in ("cifar10", "cifar100", "tinyimagenet", "imagenet")
        for arch in ("resnet18", "wrn28_10", "vgg16", "densenet")
        for name, what in wanted.items()
    }
    named |= {
        f"fig3-{name}-r{r}": what
        for r in ("0.2", "0.5", "0.8")
        for name, what in (
            ("standard-moe", ("moe", "standard")),
            ("router-at", ("moe", "router_at")),
            ("at-s-dense", ("s_dense", "at")),
            ("mask-at", ("sparse_cnn", "mask_at")),
        )
    }
    named |= {"fig5-expert-at": ("moe", "expert_at")}
    for name, run in RECIPES.items():
        start = {} if run.starts_from is None else {"init": "0" * 64}
        model, train = resolve(dataset_info(run.dataset), run.model, {**run.train, **start}, **run.attack)
        assert (model.kind, train.method) == named.pop(name, (model.kind, train.method)), name
        for pattern, value in (
            (r"-n(\d+)-", model.num_experts),
            (r"-r(0\.\d)$", model.model_scale),
            (r"-steps(\d+)$", train.attack.steps),
        ):
            if found := re.search(pattern, name):
                assert float(found[1]) == value, name
    assert not named
