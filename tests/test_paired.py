"""Paired differences, and the controls of an MoE-CNN."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rooms import TwoRooms, room_images
from torch import Tensor, nn

import advmoe
from advmoe.config import AttackConfig, ModelConfig, to_dict
from advmoe.data.sets import ImageSet
from advmoe.errors import ConfigError, DataError
from advmoe.evaluation.controls import controlled
from advmoe.evaluation.paired import (
    COMPARED,
    check_same_images,
    comparable,
    load_outcomes,
    paired_difference,
    told_apart,
)
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
    assert str(difference) == "+12.50 ± 21.19"  # sqrt(3 - 1/8) / 8 = 0.21194
    # 3 in 100 images may differ although none of these does: 0.97^100 = 0.048.
    alike = np.ones(100, bool)
    assert str(paired_difference(alike, alike)) == "0.00 (< 3.00)"


def test_models_of_one_name_are_told_apart_by_the_ends_of_their_paths(tmp_path: Path) -> None:
    def told(names: str, *places: str) -> list[str]:
        return told_apart(names.split(), [tmp_path / place for place in places])

    assert told("a/best b/best", "x", "y") == ["a/best", "b/best"]
    assert told("a/best a/best b/best", "x/1/eval", "x/2/eval", "x/3/eval") == ["1/eval", "2/eval", "b/best"]
    assert told("a/best a/best", "x", "y") == ["x", "y"]
    assert told("a/best a/best x", "x", "y", "z") == [f"{tmp_path.name}/x", f"{tmp_path.name}/y", "x"]
    with pytest.raises(ConfigError, match=r"got .*/x twice; leave one out"):
        told("a/best b/best", "x", "y/../x")


def test_outcomes_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    for arrays in (
        {"index": np.arange(3)},
        {"index": np.arange(3), "label": np.arange(3), "sa": np.ones(3), "ra": [1]},
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="does not hold the outcomes of an evaluation image by image"):
            load_outcomes(path)


def card_of(name: str, kind: str, *ran: str) -> dict[str, Any]:
    """The part of a card that tells what was run on which model."""
    model = to_dict(ModelConfig(arch="vgg16", kind=kind))  # type: ignore[arg-type]
    numbers = {"model": model, "attack": to_dict(AttackConfig())} | dict.fromkeys(ran, 50.0)
    if "ra_further_starts" in ran:
        numbers["further_starts"] = 13
    return {"name": name, "dataset": "digits", "advmoe": numbers}


def outcomes_of(card: dict[str, Any]) -> dict[str, Any]:
    ran = {"sa", "ra", "ra_pgd", "ra_worst"} | (card["advmoe"].keys() & {"ra_aa"})
    return {"index": np.arange(4), "label": np.arange(4)} | {name: np.ones(4, bool) for name in ran}


@pytest.mark.parametrize(
    ("cards", "kept", "reason"),
    [
        ([("moe", "ra_route"), ("s_dense", "ra_further_starts")], "sa ra ra_pgd ra_worst", ""),
        ([("dense",), ("s_dense",)], "sa ra ra_pgd ra_worst", ""),
        ([("moe", "ra_route"), ("s_dense",)], "sa ra_pgd", "1 got fewer starts of PGD than the other models got"),
        ([("dense", "ra_further_starts"), ("s_dense",)], "sa ra_pgd", "1 got fewer starts of PGD than the other"),
        (
            [("moe", "ra_route", "ra_aa"), ("s_dense", "ra_further_starts", "ra_aa")],
            "sa ra ra_pgd ra_aa ra_worst",
            "",
        ),
        ([("moe",), ("s_dense",)], "sa ra_pgd", "the routing of 0 was not attacked"),
        ([("moe", "ra_route"), ("moe",)], "sa ra_pgd", "the routing of 1 was not attacked"),
        ([("dense",), ("s_dense", "ra_aa")], "sa ra ra_pgd", "AutoAttack ran on 1 only"),
        ([("moe", "ra_aa"), ("s_dense", "ra_aa")], "sa ra_pgd ra_aa", "the routing of 0 was not attacked"),
    ],
)
def test_only_figures_that_rest_on_the_same_attacks_are_compared(
    cards: list[tuple[str, ...]], kept: str, reason: str
) -> None:
    made = [card_of(str(number), *what) for number, what in enumerate(cards)]
    figures, left_out = comparable(made, [outcomes_of(card) for card in made])
    assert [figure.key for figure in figures] == kept.split()
    assert bool(left_out) == bool(reason)
    assert all(reason in why for why in left_out.values())
    assert left_out.keys() <= {figure.key for figure in COMPARED}


def test_other_images_and_another_pgd_are_refused() -> None:
    first, other = card_of("a", "dense"), card_of("b", "dense")
    same, moved = outcomes_of(first), outcomes_of(other) | {"index": np.arange(1, 5)}
    check_same_images([first, other], [same, outcomes_of(other)])
    with pytest.raises(ConfigError, match="got images 4 for a and 4 others for b"):
        check_same_images([first, other], [same, moved])
    seen, others = ({"pixels": np.array(digests)} for digests in ([1, 2, 3, 4], [1, 2, 3, 5]))
    check_same_images([first, other], [same | seen, same | seen])
    check_same_images([first, other], [same | seen, same])  # the outcomes of an earlier version
    with pytest.raises(ConfigError, match="got images 4 for a and 4 others for b"):
        check_same_images([first, other], [same | seen, same | others])
    larger = card_of("b", "dense")
    larger["advmoe"]["model"]["image_size"] = 64
    with pytest.raises(ConfigError, match="got images of 32x32 pixels for a and 64x64 pixels for b"):
        check_same_images([first, larger], [same, same])
    other["advmoe"]["attack"]["steps"] = 20
    with pytest.raises(ConfigError, match=r"got attack PGD-50, eps 8/255, .* and PGD-20, eps 8/255"):
        check_same_images([first, other], [same, same])
    other["advmoe"]["attack"] |= {"steps": 50, "eps": 8 / 255 + 1e-9}  # equal when rounded
    with pytest.raises(ConfigError, match=r"got attack \{'eps': 0\.03137254901.* and \{'eps': 0\.03137255001"):
        check_same_images([first, other], [same, same])


def test_the_digest_of_an_image_depends_on_its_pixels_and_its_size() -> None:
    black, (labels, names) = np.zeros((2, 4, 4, 3), np.uint8), (np.zeros(2, np.int64), ("zero",))
    gray = black.copy()
    gray[1, 3, 3, 2] = 1
    sets = (black, gray, black.reshape(2, 2, 8, 3))
    plain, one_pixel, wide = (ImageSet(pixels, labels, names).digests for pixels in sets)
    assert plain[0] == plain[1] == one_pixel[0]
    assert len({plain[0], one_pixel[1], wide[0]}) == 3


def test_inverted_routers_take_the_other_of_two_experts_and_random_ones_are_a_seeds() -> None:
    images = room_images(0.4, 0.6)

    def taken(model: RoutedNetwork) -> list[int]:
        pathways: Tensor = model.forward_with_routing(images)[1].expert_index_BL
        return pathways[:, 0].tolist()  # type: ignore[no-any-return]

    model = TwoRooms()
    assert taken(model) == [0, 1]
    assert taken(controlled(model, "inverted", 0, calibration=())) == [1, 0]
    weights = [controlled(model, "random", seed, calibration=()).routers[0].linear.weight for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[2])  # type: ignore[arg-type]
    assert taken(model) == [0, 1]  # the model itself is left alone


def test_a_control_gets_the_statistics_of_its_own_features(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg(seed=3, warm=True).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [images[:4], images[4:8]]
    control = controlled(model, "inverted", 0, calibration=batches)
    assert not control.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Before the first routed layer, the statistics are plain means over the batches.
    features: list[Tensor] = []
    norms = [next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)) for net in (control, model)]
    with torch.no_grad():
        hook = norms[0].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for batch in batches:
            control(batch)
        hook.remove()
    expected = torch.stack([x.mean(dim=(0, 2, 3)) for x in features]).mean(dim=0)
    torch.testing.assert_close(norms[0].running_mean, expected)
    assert not torch.allclose(norms[0].running_mean, norms[1].running_mean)  # type: ignore[arg-type]
    assert norms[0].momentum == norms[1].momentum
    for ours, theirs in zip(control.routers, model.routers, strict=True):
        assert not torch.equal(ours.center.running_mean, theirs.center.running_mean)  # type: ignore[union-attr, arg-type]


def test_an_unchanged_control_keeps_all_weights(tiny_vgg: Callable[..., RoutedNetwork], images: Tensor) -> None:
    model = tiny_vgg(seed=3, warm=True).eval()
    control = controlled(model, "unchanged", 0, calibration=[images])
    for (name, own), other in zip(model.named_parameters(), control.parameters(), strict=True):
        assert torch.equal(own, other), name
    assert any(not torch.equal(a, b) for a, b in zip(model.buffers(), control.buffers(), strict=True))


def test_a_random_router_of_the_whole_image_keeps_none_of_its_weights() -> None:
    model = advmoe.create_model("resnet18", num_classes=3, image_size=8, width=0.0625, granularity="image").eval()
    for module in model.routers.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)  # as if trained
    control = controlled(model, "random", 1, calibration=())
    for (name, own), other in zip(model.routers.named_parameters(), control.routers.parameters(), strict=True):
        assert name.endswith(".bias") or not torch.equal(own, other), name
    for own, other in zip(model.expert_parameters(), control.expert_parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("model_scale", [0.5, 0.75])
def test_averaged_experts_are_one_expert(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, model_scale: float
) -> None:
    model = tiny_vgg(seed=3, warm=True, model_scale=model_scale).eval()
    averaged = controlled(model, "averaged", 0, calibration=())
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
    averaged = controlled(model, "averaged", 0, calibration=())
    first = next(module for module in averaged.modules() if isinstance(module, MoEConv2d))
    assert first.bias is not None
    torch.testing.assert_close(first.bias[list(first.rows[0])], torch.ones(first.out_channels))  # the mean of 0 and 2
    assert averaged(images).isfinite().all()


def test_experts_are_not_averaged_where_routers_scale_their_outputs(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    # Equal logits would scale every output by 1/2, whatever the routers' probabilities were.
    with pytest.raises(ConfigError, match="with router_gradient 'value' their probabilities also scale"):
        controlled(tiny_vgg(router_gradient="value"), "averaged", 0, calibration=())
    controlled(tiny_vgg(router_gradient="value"), "inverted", 0, calibration=())


def test_a_model_without_a_choice_of_experts_has_no_control(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    with pytest.raises(ConfigError, match="no choice of experts"):
        controlled(tiny_vgg(kind="s_dense"), "random", 0, calibration=())
