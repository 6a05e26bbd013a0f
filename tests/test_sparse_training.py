"""AT (Sparse): three phases of one run, the part of the network that each changes, and the final network."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import MODEL, TRAIN, Observer, assert_identical, contents, resumed, train
from torch import Tensor

from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.loader import Batch
from advmoe.data.sources import Dataset
from advmoe.errors import ConfigError
from advmoe.evaluation.cost import measure_cost
from advmoe.models.masked import compact, mask_pathway, masks_open, open_masks
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.training.checkpoint import Checkpoint
from advmoe.training.levels import make_levels
from advmoe.training.methods import HYDRA, METHODS, resolve_method
from advmoe.training.schedule import Schedule, cosine
from advmoe.training.start import start_from

ATTACK = AttackConfig(steps=1, step_size=5 / 255, start="gaussian")
CONFIG = TrainConfig(dataset="digits", method="at_sparse", batch_size=8, attack=ATTACK)


@pytest.fixture
def sparse(tiny_vgg: Callable[..., RoutedNetwork]) -> RoutedNetwork:
    return tiny_vgg(kind="sparse_cnn")


DENSE, MASKS, KEPT = 0, 1, 2
"""The phases of AT (Sparse)."""


def run(model: RoutedNetwork, method: str, number: int = 0, steps: int = 1, config: TrainConfig = CONFIG) -> None:
    """Some steps from the beginning of a phase."""
    phase = METHODS[method].phases[number]
    levels = make_levels(METHODS[method].levels, model, config, fresh=False)
    if phase.begin is not None:
        phase.begin(model)
    active = levels if phase.part is None else [level.restricted(phase.part) for level in levels]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = Batch(
            torch.rand(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator), torch.arange(8)
        )
        METHODS[method].step(active, [batch], config, [generator], 0)


def scores(model: RoutedNetwork) -> list[Tensor]:
    return [value.detach().clone() for value in model.mask_parameters()]


def weights(model: RoutedNetwork) -> list[Tensor]:
    return [value.detach().clone() for value in model.expert_parameters()]


def same(before: list[Tensor], after: list[Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(before, after, strict=True)]


def test_first_phase_trains_dense_and_leaves_the_scores_alone(
    sparse: RoutedNetwork, tiny_vgg: Callable[..., RoutedNetwork]
) -> None:
    dense = tiny_vgg(kind="dense")
    dense.load_state_dict({name: value for name, value in sparse.state_dict().items() if "masks" not in name})
    before = scores(sparse)
    run(sparse, "at_sparse", DENSE, steps=2)
    run(dense, "at", steps=2)
    assert all(same(before, scores(sparse)))
    for mine, other in zip(weights(sparse), weights(dense), strict=True):
        torch.testing.assert_close(mine, other)


def test_second_phase_starts_scores_from_the_weights_and_changes_nothing_else(sparse: RoutedNetwork) -> None:
    run(sparse, "at_sparse", DENSE)
    before = weights(sparse)
    assert masks_open(sparse)
    run(sparse, "at_sparse", MASKS, steps=2)
    assert not masks_open(sparse)
    assert all(same(before, weights(sparse)))
    # scores started at the norms of the weights, at most 1, and moved by two steps of SGD
    assert all(0 < value.max() < 2 and value.unique().numel() > 1 for value in scores(sparse))


def test_third_phase_trains_the_weights_under_fixed_masks(sparse: RoutedNetwork) -> None:
    for number in (DENSE, MASKS):
        run(sparse, "at_sparse", number)
    fixed, pathway, before = scores(sparse), mask_pathway(sparse), weights(sparse)
    run(sparse, "at_sparse", KEPT, steps=2)
    assert all(same(fixed, scores(sparse)))
    assert mask_pathway(sparse) == pathway
    assert not any(same(before, weights(sparse)))


def test_mask_at_changes_the_scores_only_and_expert_at_the_weights_only(sparse: RoutedNetwork) -> None:
    before = weights(sparse), scores(sparse)
    run(sparse, "mask_at", config=dataclasses.replace(CONFIG, awp=0.01))
    assert all(same(before[0], weights(sparse)))
    assert not any(same(before[1], scores(sparse)))
    before = weights(sparse), scores(sparse)
    run(sparse, "expert_at")
    assert not any(same(before[0], weights(sparse)))
    assert all(same(before[1], scores(sparse)))


def test_a_sparse_cnn_starts_from_its_dense_checkpoint(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    dense, sparse = tiny_vgg(seed=1, kind="dense"), tiny_vgg(seed=2, kind="sparse_cnn", model_scale=0.25)
    start_from(sparse, Checkpoint(model=dense.config, weights=dense.state_dict()))
    assert all(same(weights(dense), weights(sparse)))
    images = torch.rand(2, 3, 32, 32)
    open_masks(sparse)
    assert torch.equal(sparse.eval()(images), dense.eval()(images))


def test_another_network_is_refused_as_a_start(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    other = tiny_vgg(kind="dense", width=0.125)
    with pytest.raises(ConfigError, match=r"holds another model: width = 0.125 \(not 0.0625\); repeat its options"):
        start_from(tiny_vgg(kind="sparse_cnn"), Checkpoint(model=other.config, weights=other.state_dict()))
    s_dense = tiny_vgg(kind="s_dense")
    with pytest.raises(ConfigError, match=r"kind = s_dense \(not sparse_cnn\)"):
        start_from(tiny_vgg(kind="sparse_cnn"), Checkpoint(model=s_dense.config, weights=s_dense.state_dict()))


def test_a_checkpoint_is_built_without_its_dropped_channels_once_masks_are_learned(sparse: RoutedNetwork) -> None:
    run(sparse, "at_sparse", DENSE)
    dense_cost = measure_cost(sparse, 32)
    assert measure_cost(Checkpoint(model=sparse.config, weights=sparse.state_dict()).build(), 32) == dense_cost
    with pytest.raises(ConfigError, match="masks can be compacted, but these are not learned yet"):
        compact(sparse)
    run(sparse, "at_sparse", MASKS)
    run(sparse, "at_sparse", KEPT)
    built = Checkpoint(model=sparse.config, weights=sparse.state_dict()).build()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(built(images), sparse.eval()(images))
    reference = build_model(dataclasses.replace(sparse.config, kind="s_dense"))
    assert measure_cost(built, 32) == measure_cost(reference, 32)


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("at_sparse", "moe", "method 'at_sparse' trains model kind sparse_cnn, got 'moe'"),
        ("advmoe", "sparse_cnn", "method 'advmoe' trains model kind moe, got 'sparse_cnn'"),
        ("router_at", "sparse_cnn", "method 'router_at' trains model kind moe, got 'sparse_cnn'"),
        ("mask_at", "sparse_cnn", "method 'mask_at' goes on from a trained model; give its checkpoint"),
    ],
)
def test_methods_and_kinds_that_do_not_go_together_are_refused(method: str, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_method(method, ModelConfig(arch="vgg16", kind=kind))


def test_the_learning_rate_falls_along_a_cosine() -> None:
    assert cosine(0, 8, 0.1) == pytest.approx(0.1)
    assert cosine(2, 8, 0.1) == pytest.approx(0.1 * (1 + 2**-0.5) / 2)
    assert cosine(4, 8, 0.1) == pytest.approx(0.05)
    assert cosine(8, 8, 0.1) == pytest.approx(0.0)


def test_each_phase_has_the_epochs_and_the_schedule_that_hydra_gives_it() -> None:
    # HYDRA: 100 epochs from 0.1, 20 from 0.1, 100 from 0.01, each down to zero. Here an epoch has 3
    # steps.
    schedule = Schedule(HYDRA, 100, 3)
    assert (schedule.epochs, schedule.steps) == (220, 660)
    assert [schedule.span(step).first for step in (0, 299, 300, 359, 360, 659)] == [0, 0, 300, 300, 360, 360]
    rates = {step: schedule.rate(step, 0.1) for step in (0, 150, 299, 300, 330, 359, 360, 510, 659)}
    for first, middle, last, peak in ((0, 150, 299, 0.1), (300, 330, 359, 0.1), (360, 510, 659, 0.01)):
        assert rates[first] == pytest.approx(peak)
        assert rates[middle] == pytest.approx(peak / 2)
        assert rates[last] < peak / 100
    assert [schedule.is_final(steps) for steps in (300, 360, 361, 660)] == [False, False, True, True]
    assert Schedule(HYDRA, 1, 3).epochs == 3, "a phase has an epoch at least"


def test_momentum_ends_with_its_phase(digits: Dataset, tmp_path: Path) -> None:
    # One epoch of two steps for each phase. Without a step that could have momentum, SGD changes a weight by
    # -rate * (gradient + decay * weight), so the buffer of a phase's first step is that gradient alone.
    class Witness(Observer):
        def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
            assert (epochs, steps_per_epoch) == (3, 2)

        def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
            super().stepped(step, images, figures)
            assert self.trainer is not None
            (level,) = self.trainer.levels
            touched[step] = {id(parameter) for parameter in level.optimizer.state}
            rates[step] = level.optimizer.param_groups[0]["lr"]
            masks = {id(parameter) for parameter in self.trainer.model.mask_parameters()}
            weights = {id(parameter) for parameter in self.trainer.model.expert_parameters()}
            expected[step] = masks if step in {3, 4} else weights

    touched: dict[int, set[int]] = {}
    expected: dict[int, set[int]] = {}
    rates: dict[int, float] = {}
    config = dataclasses.replace(TRAIN, method="at_sparse", epochs=1)
    sparse = dataclasses.replace(MODEL, kind="sparse_cnn")
    assert train(digits, tmp_path / "whole", config, model=sparse, observer=Witness())
    assert touched == expected, "each phase has a state of its own parameters only"
    assert rates == pytest.approx({1: 0.1, 2: 0.05, 3: 0.1, 4: 0.05, 5: 0.01, 6: 0.005})
    for step in (2, 3, 4, 5):
        stopping = Witness(stop_after=step)
        assert not train(digits, tmp_path / str(step), config, model=sparse, observer=stopping)
        assert resumed(digits, tmp_path / str(step), config, model=sparse, observer=Witness())
        assert_identical(contents(tmp_path / str(step)), contents(tmp_path / "whole"))


def test_averaging_across_phases_is_refused() -> None:
    with pytest.raises(ConfigError, match="ema would average the different networks of at_sparse's phases"):
        dataclasses.replace(CONFIG, ema=0.999)
