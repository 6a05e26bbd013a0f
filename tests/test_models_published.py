"""Dense networks have the published numbers of parameters and multiply-adds."""

import pytest
import torch

from advmoe.evaluation.cost import measure_cost
from advmoe.models.registry import create_model

# architecture, pixels, classes; published parameters, ours minus these; published GFLOPs
# (multiply-adds), relative tolerance; source imgclsmob = tables of github.com/osmr/imgclsmob; it
# also counts elementwise work, which matters most for DenseNet. torchvision = the weights' own
# `meta`. VGG: published with biases before BatchNorm, which cancels them; we have none: 2 * 64 + 2
# * 128 + 3 * 256 + 6 * 512 = 4,224 fewer.
TABLE = [
    ("resnet18", 32, 10, 11_173_962, 0, 0.56, 0.01, "kuangliu/pytorch-cifar"),
    ("resnet18", 224, 1000, 11_689_512, 0, 1.814, 1e-3, "torchvision"),
    ("wrn28_10", 32, 10, 36_479_194, 0, 5.24698, 1e-3, "imgclsmob"),
    ("vgg16", 32, 10, 14_728_266, -4_224, 0.31, 0.02, "kuangliu/pytorch-cifar"),
    ("vgg16", 224, 1000, 138_365_992, -4_224, 15.47, 1e-3, "torchvision"),
    ("vit", 224, 1000, 22_050_664, 0, 4.6, 1e-3, "DeiT, Table 1 (22M); timm's vit_small_patch16_224"),
    ("densenet", 32, 10, 769_162, 0, 0.29845, 0.04, "imgclsmob"),
    ("densenet", 224, 1000, 7_978_856, 0, 2.834, 1e-3, "torchvision"),
]


@pytest.mark.parametrize(
    ("arch", "size", "classes", "parameters", "difference", "gflops", "tolerance", "source"),
    TABLE,
    ids=[f"{row[0]}-{row[1]}" for row in TABLE],
)
def test_dense_has_the_published_size_and_cost(
    arch: str, size: int, classes: int, parameters: int, difference: int, gflops: float, tolerance: float, source: str
) -> None:
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        model = create_model(arch, kind="dense", num_classes=classes, image_size=size)
        cost = measure_cost(model, size)
    assert cost.parameters == parameters + difference, source
    assert cost.gflops == pytest.approx(gflops, rel=tolerance), source


@pytest.mark.parametrize("arch", ["resnet18", "wrn28_10", "vgg16", "densenet"])
def test_64_pixels_keep_the_small_stem_and_cost_four_times_as_much_as_32(arch: str) -> None:
    with torch.device("meta"):
        costs = [
            measure_cost(create_model(arch, kind="dense", num_classes=10, image_size=size), size) for size in (32, 64)
        ]
    assert costs[0].parameters == costs[1].parameters
    assert costs[1].gflops == pytest.approx(4 * costs[0].gflops, rel=1e-4)  # but for the classifier


@pytest.mark.parametrize("arch", ["resnet18", "wrn28_10", "vgg16", "densenet"])
def test_half_the_model_scale_is_a_quarter_of_the_cost(arch: str) -> None:
    # r^2 = 1/4, but for the layers that read the image or write the logits, whose cost is halved
    with torch.device("meta"):
        dense, half = (
            measure_cost(create_model(arch, kind=kind, num_classes=10), 32).gflops for kind in ("dense", "s_dense")
        )
    assert half == pytest.approx(dense / 4, rel=0.01)
