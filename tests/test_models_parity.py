"""The backbones give the same outputs as the reference implementations with the same weights."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from grid import Cell
from torch import Tensor

from advmoe.evaluation.cost import measure_cost
from advmoe.models.registry import create_model


@pytest.mark.parametrize(("arch", "reference"), [("resnet18", "resnet18"), ("densenet", "densenet121")])
def test_dense_equals_torchvision(arch: str, reference: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(reference, num_classes=7).eval()
    ours = create_model(arch, kind="dense", num_classes=7, image_size=128).eval()
    randomize_norms(theirs)
    # both list their layers in the order of the forward pass; only the names differ, and our mean
    # and std
    names = [name for name in ours.state_dict() if name not in {"mean", "std"}]
    ours.load_state_dict(dict(zip(names, theirs.state_dict().values(), strict=True)), strict=False)
    images = torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_vit_equals_torchvision() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(64, 8, 2, 6, 48, 192, num_classes=7).eval()
    torch.nn.init.normal_(theirs.heads.head.weight)  # torchvision starts it at zero
    ours = create_model("vit", kind="dense", num_classes=7, image_size=64, width=0.125, depth=2).eval()
    state = theirs.state_dict()
    state = {name: state.pop(name) for name in ("class_token", "encoder.pos_embedding")} | state
    names = [name for name in ours.state_dict() if name not in {"mean", "std"}]
    ours.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=False)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_wrn_equals_the_functional_form_of_its_paper() -> None:
    model = Cell("wrn28_10", "dense", 32).build()
    randomize_norms(model)
    model.eval()
    weights, images = model.state_dict(), Cell("wrn28_10", "dense", 32).images()

    def norm(x: Tensor, name: str) -> Tensor:
        statistics = (weights[f"{name}.running_mean"], weights[f"{name}.running_var"])
        return F.batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.conv2d(images, weights["stem.conv.weight"], padding=1)
    for group in range(3):
        for block in range(4):
            name, stride = f"blocks.{4 * group + block}", 2 if group > 0 and block == 0 else 1
            o1 = F.relu(norm(x, f"{name}.norm1"))
            y = F.conv2d(o1, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            z = F.conv2d(F.relu(norm(y, f"{name}.norm2")), weights[f"{name}.conv2.weight"], padding=1)
            x = z + (F.conv2d(o1, weights[f"{name}.shortcut.weight"], stride=stride) if block == 0 else x)
    features = F.relu(norm(x, "norm")).mean(dim=(2, 3))
    expected = F.linear(features, weights["classifier.weight"], weights["classifier.bias"])
    torch.testing.assert_close(model(images), expected)


def randomize_norms(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("arch", ["densenet", "resnet18", "vgg16", "vit", "wrn28_10"])
def test_moe_with_one_expert_equals_s_dense(arch: str) -> None:
    cell = Cell(arch, "moe", 32)
    one, s_dense = cell.build(num_experts=1).eval(), Cell(arch, "s_dense", 32).build().eval()
    state = one.state_dict()
    s_dense.load_state_dict({name: state[name] for name in s_dense.state_dict()})
    assert torch.equal(one(cell.images()), s_dense(cell.images()))


@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "image"])
@pytest.mark.parametrize(
    ("arch", "routers"),
    [
        # layer: all MoE layers; block: pairs of them (a VGG layer is its own block); stage: those
        # with any; image: 1
        ("resnet18", {"layer": 16, "block": 8, "stage": 4, "image": 1}),
        ("wrn28_10", {"layer": 24, "block": 12, "stage": 3, "image": 1}),
        ("vgg16", {"layer": 12, "block": 12, "stage": 5, "image": 1}),
        ("vit", {"layer": 2, "block": 2, "stage": 1, "image": 1}),
        ("densenet", {"layer": 18, "block": 9, "stage": 3, "image": 1}),  # depth 22: three blocks of three layers
    ],
)
def test_granularity_decides_how_many_routers_there_are(arch: str, routers: dict[str, int], granularity: str) -> None:
    cell = Cell(arch, "moe", 32)
    model = cell.build(granularity=granularity)
    routing = model.forward_with_routing(cell.images(8))[1]
    assert len(model.routers) == routers[granularity]
    assert routing.logits_BRN.shape == (8, routers[granularity], 2)
    # layers that share a router share its decision
    for layer, router in enumerate(model.router_of_layer):
        first = model.router_of_layer.index(router)
        assert torch.equal(routing.expert_index_BL[:, layer], routing.expert_index_BL[:, first])


def test_image_router_sees_the_normalized_image_and_nothing_else() -> None:
    cell = Cell("resnet18", "moe", 32)
    model = cell.build(granularity="image", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2)).eval()
    images = cell.images(4)
    normalized = (images - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / 0.2
    expected = model.routers[0](normalized)
    for parameter in model.expert_parameters():
        parameter.data.normal_()
    torch.testing.assert_close(model.forward_with_routing(images)[1].logits_BRN[:, 0], expected)


@pytest.mark.parametrize("expert_filters", ["windows", "separate"])
@pytest.mark.parametrize(("num_experts", "model_scale"), [(1, 0.1), (3, 0.3), (10, 0.9), (16, 0.1), (16, 1.0)])
@pytest.mark.parametrize("arch", ["resnet18", "vit"])
def test_a_pathway_costs_s_dense_and_its_routers_for_any_n_and_r(
    arch: str, num_experts: int, model_scale: float, expert_filters: str
) -> None:
    if (arch, expert_filters, model_scale) == ("vit", "windows", 1.0):
        model_scale = 0.95  # r = 1 is refused there
    settings = {"width": 0.25, "model_scale": model_scale, **({"depth": 2} if arch == "vit" else {})}
    moe = create_model(arch, num_experts=num_experts, expert_filters=expert_filters, **settings)
    moe(torch.rand(3, 3, 32, 32)).sum().backward()
    inputs = sum(router.linear.in_features for router in moe.routers)
    s_dense = measure_cost(create_model(arch, kind="s_dense", **settings), 32)
    assert measure_cost(moe, 32).gflops == pytest.approx(s_dense.gflops + inputs * num_experts / 1e9, rel=1e-12)
