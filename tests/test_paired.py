"""Paired differences, and the controls of an MoE-CNN."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rooms import TwoRooms, room_images
from torch import Tensor

from advmoe.errors import ConfigError, DataError
from advmoe.evaluation.controls import controlled
from advmoe.evaluation.paired import load_outcomes, paired_difference
from advmoe.models.moe_conv import ExpertAffine, MoEConv2d
from advmoe.models.network import RoutedNetwork


def test_the_error_of_a_difference_counts_the_images_on_which_models_differ() -> None:
    ours = np.array([True, True, True, False, False, True, True, True])
    theirs = np.array([True, False, False, False, True, True, True, True])
    # Two images for us, one for them, of 8. The differences are 0, 1, 1, 0, -1, 0, 0, 0: their mean
    # is 1/8, their variance 3/8 - 1/64, and the standard error its root over the root of 8.
    difference = paired_difference(ours, theirs)
    assert difference.points == 12.5
    assert difference.error == pytest.approx(100 * np.std(ours.astype(int) - theirs) / math.sqrt(8))
    # Equal models differ by nothing, without doubt, although each share alone has an error of 15
    # points.
    assert paired_difference(ours, ours).error == 0.0


def test_outcomes_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    for arrays in (
        {"index": np.arange(3)},
        {"index": np.arange(3), "label": np.arange(3), "sa": np.ones(3), "ra": [1]},
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="does not hold the outcomes of an evaluation image by image"):
            load_outcomes(path)


def test_inverted_routers_take_the_other_of_two_experts_and_random_ones_are_a_seeds() -> None:
    images = room_images(0.4, 0.6)

    def taken(model: RoutedNetwork) -> list[int]:
        pathways: Tensor = model.forward_with_routing(images)[1].expert_index_BL
        return pathways[:, 0].tolist()  # type: ignore[no-any-return]

    model = TwoRooms()
    assert taken(model) == [0, 1]
    assert taken(controlled(model, "inverted", 0)) == [1, 0]
    weights = [controlled(model, "random", seed).routers[0].linear.weight for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[2])  # type: ignore[arg-type]
    assert taken(model) == [0, 1]  # the model itself is left alone


@pytest.mark.parametrize("model_scale", [0.5, 0.75])
def test_averaged_experts_are_one_expert(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, model_scale: float
) -> None:
    model = tiny_vgg(seed=3, warm=True, model_scale=model_scale).eval()
    averaged = controlled(model, "averaged", 0)
    assert not averaged.forward_with_routing(images)[1].expert_index_BL.any()
    conv, changed = (next(m for m in net.modules() if isinstance(m, MoEConv2d)) for net in (model, averaged))
    first, second = (list(rows) for rows in conv.rows)
    torch.testing.assert_close(changed.weight[first], (conv.weight[first] + conv.weight[second]) / 2)


def test_averaging_takes_the_scale_and_shift_of_each_expert_into_account(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg(seed=3, warm=True, expert_affine=True).eval()
    affine = next(module for module in model.modules() if isinstance(module, ExpertAffine))
    with torch.no_grad():
        affine.shift[1] += 2.0
    averaged = controlled(model, "averaged", 0)
    first = next(module for module in averaged.modules() if isinstance(module, MoEConv2d))
    assert first.bias is not None
    torch.testing.assert_close(first.bias[list(first.rows[0])], torch.ones(first.out_channels))  # the mean of 0 and 2
    assert averaged(images).isfinite().all()


def test_a_model_without_a_choice_of_experts_has_no_control(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    with pytest.raises(ConfigError, match="no choice of experts"):
        controlled(tiny_vgg(kind="s_dense"), "random", 0)
