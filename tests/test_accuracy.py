"""SA and RA: independence of batch and order, effect of stronger attacks, and refused inputs."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from advmoe.config import AttackConfig
from advmoe.data.sources import Dataset, ImageSet
from advmoe.errors import AdvMoEError
from advmoe.evaluation.accuracy import Evaluation, evaluate
from advmoe.evaluation.card import figures
from advmoe.evaluation.results import SuiteConfig
from advmoe.evaluation.suite import run_suite
from advmoe.models.network import RoutedNetwork

EPS = 2 / 255


def labeled_by(model: RoutedNetwork, images: ImageSet) -> ImageSet:
    """The images with the model's own predictions as labels, so that an untrained model has SA 1."""
    with torch.no_grad():
        x = torch.from_numpy(images.images).permute(0, 3, 1, 2).float() / 255
        labels = model.eval()(x).argmax(dim=1).numpy()
    return ImageSet(images=images.images, labels=labels, class_names=images.class_names)


@pytest.fixture
def model(tiny_vgg: Callable[..., RoutedNetwork]) -> RoutedNetwork:
    return tiny_vgg(seed=3, warm=True).eval()


@pytest.fixture
def images(model: RoutedNetwork) -> ImageSet:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    return labeled_by(model, ImageSet(images=noise, labels=np.zeros(24, np.int64), class_names=tuple("0123456789")))


def attacked(
    model: RoutedNetwork, images: ImageSet, *, batch_size: int = 24, seed: int = 0, **attack: object
) -> Evaluation:
    settings = {"eps": EPS, "steps": 3, "step_size": EPS / 2, **attack}
    return evaluate(model, images, AttackConfig(**settings), batch_size=batch_size, seed=seed)  # type: ignore[arg-type]


def test_the_fixture_is_neither_trivial_nor_hopeless(model: RoutedNetwork, images: ImageSet) -> None:
    result = attacked(model, images)
    assert result.images == 24
    assert result.sa == 1.0
    assert 0.0 < result.ra < 1.0
    assert len(set(images.labels.tolist())) > 1
    assert len(np.unique(result.clean_pathways_IL, axis=0)) > 1


def test_the_batch_size_changes_nothing(model: RoutedNetwork, images: ImageSet) -> None:
    whole = attacked(model, images)
    for batch_size in (1, 7):
        parts = attacked(model, images, batch_size=batch_size)
        assert (parts.sa, parts.ra) == (whole.sa, whole.ra)
        np.testing.assert_array_equal(parts.clean_pathways_IL, whole.clean_pathways_IL)
        np.testing.assert_array_equal(parts.adversarial_pathways_IL, whole.adversarial_pathways_IL)


@pytest.mark.parametrize("kind", ["moe", "s_dense"])
def test_batches_of_one_shape_give_the_same_figures(
    tiny_vgg: Callable[..., RoutedNetwork], images: ImageSet, kind: str
) -> None:
    net = tiny_vgg(seed=3, warm=True, kind=kind).eval()
    own = labeled_by(net, images)
    shapes: set[int] = set()
    attack = AttackConfig(eps=EPS, steps=3, step_size=EPS / 2)
    expected = evaluate(net, own, attack, batch_size=24)
    told: list[tuple[int, float, float]] = []
    net.register_forward_pre_hook(lambda _, inputs: shapes.add(len(inputs[0])))
    found = evaluate(net, own, attack, batch_size=10, one_shape=True, progress=lambda *what: told.append(what))
    assert shapes == {10}, "24 images are 2 batches of 10 and one of 4, filled up"
    assert [number for number, _, _ in told] == [10, 20, 24]
    assert 0 < expected.ra < 1
    for name in ("right_I", "robust_I", "clean_pathways_IL", "adversarial_pathways_IL"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_same_seed_gives_the_same_figures_and_another_seed_other_starts(
    model: RoutedNetwork, images: ImageSet
) -> None:
    first, again, other = (attacked(model, images, seed=seed, steps=0, eps=0.5) for seed in (0, 0, 1))
    assert first.ra == again.ra
    np.testing.assert_array_equal(first.adversarial_pathways_IL, again.adversarial_pathways_IL)
    assert not np.array_equal(first.adversarial_pathways_IL, other.adversarial_pathways_IL)


def test_restarts_only_lower_ra(model: RoutedNetwork, images: ImageSet) -> None:
    # The first restart is the attack without restarts, and an image once broken stays broken.
    shares = [attacked(model, images, steps=1, restarts=restarts).ra for restarts in (1, 2, 5)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_without_a_radius_ra_is_sa(model: RoutedNetwork, images: ImageSet) -> None:
    result = attacked(model, images, eps=0.0, restarts=2)
    assert result.ra == result.sa
    assert result.routers_fooled == 0.0


def test_a_radius_of_the_whole_pixel_range_breaks_everything(model: RoutedNetwork, images: ImageSet) -> None:
    assert attacked(model, images, eps=1.0, step_size=0.2, steps=30).ra == 0.0


def test_wrong_images_are_neither_right_nor_robust(model: RoutedNetwork, images: ImageSet) -> None:
    half = images.labels.copy()
    half[:12] = (half[:12] + 1) % 10  # 12 of 24 are now wrong
    mixed = ImageSet(images=images.images, labels=half, class_names=images.class_names)
    whole, right = attacked(model, mixed), attacked(model, images.take(np.arange(12, 24)))
    assert whole.sa == 0.5
    # The starts follow the image's row number, so only the count of the second half can differ from
    # its own attack.
    assert whole.ra <= 0.5
    assert right.sa == 1.0
    # The routers are judged by all images: one that is wrong when clean is attacked like the
    # others.
    assert (whole.adversarial_pathways_IL[:12] != whole.clean_pathways_IL[:12]).any()


@pytest.mark.parametrize("restarts", [1, 3])
def test_validation_and_result_card_give_the_same_figures(
    model: RoutedNetwork, images: ImageSet, restarts: int
) -> None:
    labels = images.labels.copy()
    labels[:12] = (labels[:12] + 1) % 10  # half of the images are wrong when clean
    mixed = ImageSet(images=images.images, labels=labels, class_names=images.class_names)
    attack = AttackConfig(eps=EPS, steps=3, step_size=EPS / 2, restarts=restarts)
    validated = evaluate(model, mixed, attack).as_dict()
    suite = run_suite(model, mixed, SuiteConfig(attack=attack, routing=False, diagnosed=0))
    card = figures(suite)
    assert validated["sa"] == card["sa"] == 50.0
    assert 0 < validated["ra_pgd3"] == card["ra_pgd3"] < 50
    assert 0 < validated["routers_fooled"] == card["routers_fooled"]


def test_a_set_without_a_right_image_is_no_error(model: RoutedNetwork, images: ImageSet) -> None:
    wrong = ImageSet(images=images.images, labels=(images.labels + 1) % 10, class_names=images.class_names)
    result = attacked(model, wrong)
    assert (result.sa, result.ra) == (0.0, 0.0)


def test_the_model_is_left_as_it_was(model: RoutedNetwork, images: ImageSet) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    attacked(model, images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("label", [0, 7])
@pytest.mark.parametrize("part", ["router", "classifier"])
def test_a_model_with_nan_is_refused_and_never_robust(
    model: RoutedNetwork, images: ImageSet, part: str, label: int, steps: int
) -> None:
    # A NaN router is the trap of the released code: its argmax is expert 0, clean logits are fine,
    # and only the attack sees NaN. Once with images of one class, because argmax of NaN logits is
    # class 0: right, or beaten, at no cost.
    if part == "router":
        nn.init.constant_(model.routers[4].linear.weight, float("nan"))  # type: ignore[union-attr, arg-type]
        images = labeled_by(model, images)
    else:
        nn.init.constant_(model.classifier.bias, float("nan"))  # type: ignore[union-attr, arg-type]
    one_class = ImageSet(images=images.images, labels=np.full(24, label), class_names=images.class_names)
    for asked in (images, one_class):
        with pytest.raises(AdvMoEError, match="not finite"):
            attacked(model, asked, steps=steps)


def test_figures_name_their_attack(model: RoutedNetwork, images: ImageSet) -> None:
    figures = attacked(model, images, steps=3, restarts=2, seed=5).as_dict()
    assert figures["images"] == 24
    assert figures["sa"] == 100.0
    assert 0 <= figures["ra_pgd3"] <= 100
    assert figures["attack"] == {"eps": EPS, "steps": 3, "step_size": EPS / 2, "restarts": 2, "start": "uniform"}
    assert figures["seed"] == 5


def test_progress_counts_images_and_ends_with_the_result(model: RoutedNetwork, images: ImageSet) -> None:
    seen: list[tuple[int, float, float]] = []
    attack = AttackConfig(eps=EPS, steps=1)
    result = evaluate(model, images, attack, batch_size=10, progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == [10, 20, 24]
    assert seen[-1] == (24, result.sa, result.ra)


def test_every_kind_is_evaluated_by_the_same_attack(tiny_vgg: Callable[..., RoutedNetwork], digits: Dataset) -> None:
    few = digits.test.take(np.arange(6))
    assert isinstance(few, ImageSet)
    for kind in ("dense", "s_dense"):
        result = attacked(tiny_vgg(kind=kind), few, steps=1)
        assert result.clean_pathways_IL.shape == (6, 0)
        assert "routers_fooled" not in result.as_dict()
