"""The paper's runs by name: complete, resolvable, and behind every table and figure."""

import pytest

from advmoe.cli.reproduce import EXPERIMENTS
from advmoe.config import AttackConfig
from advmoe.data.sources import dataset_info
from advmoe.errors import ConfigError
from advmoe.recipes import recipe, recipes, resolve
from advmoe.training.methods import resolve_method

RECIPES = recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_that_could_start(name: str) -> None:
    named = RECIPES[name]
    model, config = resolve(dataset_info(named.dataset), named.model, named.train)
    resolve_method(config.method, model, has_init=named.starts_from is not None)
    assert named.starts_from is None or named.starts_from in RECIPES


def test_table1_compares_five_methods_on_four_backbones_and_four_data_sets() -> None:
    assert len([name for name in RECIPES if name.startswith("table1-")]) == 5 * 4 * 4


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].model["kind"] == "moe"])
def test_experts_of_every_recipe_are_coupled(name: str) -> None:
    named = RECIPES[name]
    model, config = resolve(dataset_info(named.dataset), named.model, named.train)
    assert not model.overlapping
    assert config.specialisation == 0.25
    # windows where they do not overlap, N r <= 1, but for the ViT of Table 3, whose r is 1
    assert (model.expert_filters == "separate") == (model.num_experts * model.model_scale > 1)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_table_and_figure_has_runs(experiment: str) -> None:
    shown_in = EXPERIMENTS[experiment].shown_in
    assert [r.name for r in RECIPES.values() if shown_in in r.shown_in.split(", ")]


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


def test_overlapping_experts_are_not_coupled_and_cannot_be() -> None:
    info, model = dataset_info("cifar10"), {"arch": "vgg16", "num_experts": 4, "model_scale": 0.5}
    described, config = resolve(info, model, {})
    assert described.expert_filters == "windows"
    assert config.specialisation is None
    with pytest.raises(ConfigError, match=r"N r = 2 > 1 share filters; use expert filters 'separate', .*1/N = 0.25"):
        resolve(info, model, {"specialisation": 0.25})
    _, config = resolve(info, {**model, "expert_filters": "separate"}, {})
    assert config.specialisation == 0.25


def test_an_unknown_recipe_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fig5-expert-at'"):
        recipe("fig5-expert")
