"""AT (Sparse): three phases of one run, each changing its part of the network only, and what is left at the end."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.loader import Batch
from advmoe.errors import ConfigError
from advmoe.evaluation.cost import measure_cost
from advmoe.models.masked import compact, mask_pathway, masks_open, open_masks
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.training.checkpoint import Checkpoint
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS, PRETRAINED, PRUNED, resolve_method
from advmoe.training.start import start_from

ATTACK = AttackConfig(steps=1, step_size=5 / 255, start="gaussian")
CONFIG = TrainConfig(dataset="digits", method="at_sparse", batch_size=8, attack=ATTACK)


@pytest.fixture
def sparse(tiny_vgg: Callable[..., RoutedNetwork]) -> RoutedNetwork:
    return tiny_vgg(kind="sparse_cnn")


def run(model: RoutedNetwork, method: str, progress: float, steps: int = 1, config: TrainConfig = CONFIG) -> None:
    levels = make_levels(METHODS[method].levels, model, config, fresh=False)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = Batch(
            torch.rand(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator), torch.arange(8)
        )
        phase = METHODS[method].phase
        active = levels if phase is None else phase(levels, progress)
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
    run(sparse, "at_sparse", 0.0, steps=2)
    run(dense, "at", 0.0, steps=2)
    assert all(same(before, scores(sparse)))
    for mine, other in zip(weights(sparse), weights(dense), strict=True):
        torch.testing.assert_close(mine, other)


def test_second_phase_starts_scores_from_the_weights_and_changes_nothing_else(sparse: RoutedNetwork) -> None:
    run(sparse, "at_sparse", 0.0)
    before = weights(sparse)
    assert masks_open(sparse)
    run(sparse, "at_sparse", PRETRAINED, steps=2)
    assert not masks_open(sparse)
    assert all(same(before, weights(sparse)))
    # scores started at the norms of the weights, at most 1, and moved by two steps of SGD
    assert all(0 < value.max() < 2 and value.unique().numel() > 1 for value in scores(sparse))


def test_third_phase_trains_the_weights_under_fixed_masks(sparse: RoutedNetwork) -> None:
    for progress in (0.0, PRETRAINED):
        run(sparse, "at_sparse", progress)
    fixed, pathway, before = scores(sparse), mask_pathway(sparse), weights(sparse)
    run(sparse, "at_sparse", PRUNED, steps=2)
    assert all(same(fixed, scores(sparse)))
    assert mask_pathway(sparse) == pathway
    assert not any(same(before, weights(sparse)))


def test_mask_at_changes_the_scores_only_and_expert_at_the_weights_only(sparse: RoutedNetwork) -> None:
    before = weights(sparse), scores(sparse)
    run(sparse, "mask_at", 0.0, config=dataclasses.replace(CONFIG, awp=0.01))
    assert all(same(before[0], weights(sparse)))
    assert not any(same(before[1], scores(sparse)))
    before = weights(sparse), scores(sparse)
    run(sparse, "expert_at", 0.0)
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
    run(sparse, "at_sparse", 0.0)
    dense_cost = measure_cost(sparse, 32)
    assert measure_cost(Checkpoint(model=sparse.config, weights=sparse.state_dict()).build(), 32) == dense_cost
    with pytest.raises(ConfigError, match="masks can be compacted, but these are not learned yet"):
        compact(sparse)
    run(sparse, "at_sparse", PRUNED)
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


def test_averaging_across_phases_is_refused() -> None:
    with pytest.raises(ConfigError, match="ema would average the different networks of at_sparse's phases"):
        dataclasses.replace(CONFIG, ema=0.999)
