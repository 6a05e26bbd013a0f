"""MoE-ViT: each image or token is computed by its own expert only, and impossible settings are refused."""

import pytest
import torch
import torch.nn.functional as F
from grid import Cell

from advmoe.errors import ConfigError
from advmoe.models.moe_linear import moe_linear
from advmoe.models.registry import create_model
from advmoe.models.routing import Decision
from advmoe.training.coupling import expert_banks, start_equal

ROWS, SIZE, BANK = ((0, 1, 2), (3, 4, 5), (0, 5, 1)), 3, 6  # the last expert has nothing of its own
FLAT = [row for rows in ROWS for row in rows]


@pytest.fixture
def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, 5, generator=generator)
    weight, bias = torch.randn(BANK, 5, generator=generator), torch.randn(BANK, generator=generator)
    return x, weight, bias, torch.tensor([2, 0, 2, 1, 0, 0, 2])


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, expert_index: torch.Tensor) -> torch.Tensor:
    rows = [list(ROWS[expert]) for expert in expert_index.tolist()]
    return torch.stack([F.linear(x[b], weight[own], bias[own]) for b, own in enumerate(rows)])


def test_moe_linear_and_its_gradients_equal_the_row_by_row_reference(operands: tuple[torch.Tensor, ...]) -> None:
    *floats, expert_index = operands
    ours = [t.clone().requires_grad_() for t in floats]
    theirs = [t.clone().requires_grad_() for t in floats]
    y, expected = moe_linear(*ours, expert_index, rows=ROWS), reference(*theirs, expert_index)
    torch.testing.assert_close(y, expected)
    for mine, other in zip(
        torch.autograd.grad(y.square().sum(), ours), torch.autograd.grad(expected.square().sum(), theirs), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_the_operator_exporters_see_is_the_same_function(operands: tuple[torch.Tensor, ...]) -> None:
    operator = torch.ops.advmoe.moe_linear
    assert torch.equal(operator(*operands, FLAT, SIZE), moe_linear(*operands, rows=ROWS))
    torch.library.opcheck(operator, (*operands, FLAT, SIZE), test_utils=("test_schema", "test_faketensor"))


def test_no_row_at_all_gives_no_row(operands: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, expert_index = operands
    assert moe_linear(x[:0], weight, bias, expert_index[:0], rows=ROWS).shape == (0, 4, SIZE)


@pytest.mark.parametrize("granularity", ["layer", "token"])
def test_routed_mlp_computes_the_chosen_part_of_the_hidden_units(granularity: str) -> None:
    cell = Cell("vit", "moe", 32)
    mlp = cell.build(granularity=granularity).blocks[0].mlp
    dim, hidden = mlp.expand.weight.shape[1], mlp.expand.weight.shape[0]
    assert hidden == 4 * dim  # N = 2, r = .5: two disjoint halves
    x_UTD = torch.randn(3, 1 if granularity == "token" else 5, dim)
    y = mlp.compute(x_UTD.transpose(1, 2).unsqueeze(3), Decision(torch.tensor([1, 0, 1]), None, None))
    index_U = torch.tensor([1, 0, 1])
    as_exported = mlp.reduce(F.gelu(mlp.expand(x_UTD, index_U)), index_U)
    torch.testing.assert_close(y.squeeze(3).transpose(1, 2), as_exported)
    for row, expert in enumerate([1, 0, 1]):
        half = slice(expert * hidden // 2, (expert + 1) * hidden // 2)
        own = slice(expert * dim, (expert + 1) * dim)
        inner = F.gelu(F.linear(x_UTD[row], mlp.expand.weight[half], mlp.expand.bias[half]))
        expected = F.linear(inner, mlp.reduce.weight[own], mlp.reduce.bias[own])
        torch.testing.assert_close(y[row].squeeze(2).T, expected)


@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_each_expert_starts_with_weights_of_the_size_of_an_s_dense(num_experts: int) -> None:
    mlp = Cell("vit", "moe", 32).build(num_experts=num_experts).blocks[0].mlp
    alone = Cell("vit", "s_dense", 32).build().blocks[0].mlp
    for ours, theirs in ((mlp.expand.weight, alone.expand.weight), (mlp.reduce.weight, alone.reduce.weight)):
        # uniform, so that the largest of many weights is nearly the bound
        torch.testing.assert_close(ours.detach().abs().max(), theirs.detach().abs().max(), rtol=0.01, atol=0.0)


def test_a_router_learns_against_the_mean_of_all_experts() -> None:
    model = Cell("vit", "moe", 32).build(num_experts=3)
    mlp = model.blocks[0].mlp
    x_UTD = torch.randn(2, 5, mlp.expand.weight.shape[1])
    features = x_UTD.transpose(1, 2).unsqueeze(3)
    outputs = [mlp.compute(features, Decision(torch.full((2,), expert), None, None)) for expert in range(3)]
    mean = sum(outputs) / 3
    # The gate has value 1, and its derivative is along what sets the chosen expert apart from that
    # mean.
    gate_U = torch.ones(2, requires_grad=True)
    y = mlp.compute(features, Decision(torch.tensor([2, 0]), None, gate_U, "mean"))
    y.sum().backward()
    for row, expert in enumerate([2, 0]):
        torch.testing.assert_close(y[row], outputs[expert][row])
        torch.testing.assert_close(gate_U.grad[row], (outputs[expert][row] - mean[row]).sum(), atol=1e-4, rtol=1e-3)


def test_experts_that_start_equal_make_every_pathway_the_same_function() -> None:
    cell = Cell("vit", "moe", 32)
    model, images = cell.build().eval(), cell.images(4)
    start_equal(model)
    logits, routing = model.forward_with_routing(images)
    torch.testing.assert_close(model(images, 1 - routing.expert_index_BL), logits)
    assert len(list(expert_banks(model))) == 2 * 4  # two MLPs of two layers with weight and bias


@pytest.mark.parametrize("granularity", ["layer", "stage", "image", "token"])
def test_replaying_a_pathway_repeats_the_logits(granularity: str) -> None:
    cell = Cell("vit", "moe", 32)
    model, images = cell.build(granularity=granularity).eval(), cell.images(4)
    logits, routing = model.forward_with_routing(images)
    assert torch.equal(model(images, routing.expert_index_BL), logits)
    assert not torch.allclose(model(images, 1 - routing.expert_index_BL), logits)


def test_tokens_of_one_image_take_different_experts_layer_by_layer() -> None:
    cell = Cell("vit", "moe", 32)
    model, images = cell.build(granularity="token"), cell.images(3)
    for _ in range(20):  # routers center their input by running statistics
        model(images)
    routing = model.eval().forward_with_routing(images)[1]
    # 8 x 8 patches and the class token, in each of two layers; the first layer's decisions come
    # first
    assert routing.expert_index_BL.shape == (3, 2 * 65)
    first = routing.expert_index_BL[:, :65]
    assert 0 < first.float().mean() < 1
    assert torch.equal(routing.logits_BRN[:, :65].argmax(dim=2), first)
    # images do not look into each other: alone, each takes the pathway it takes in the batch
    alone = model.forward_with_routing(images[1:2])[1].expert_index_BL
    assert torch.equal(alone, routing.expert_index_BL[1:2])


def test_one_expert_at_r_1_is_the_backbone() -> None:
    moe = create_model("vit", width=0.125, depth=2, num_experts=1, model_scale=1.0)
    dense = create_model("vit", width=0.125, depth=2, kind="dense")
    routers = sum(parameter.numel() for parameter in moe.router_parameters())
    assert routers == 2 * 48, "one row for one expert, of the 48 features of a token, in each of two blocks"
    assert sum(p.numel() for p in moe.parameters()) - routers == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sparse_cnn"}, "vit has no channels to prune; use kind dense, s_dense or moe, or a CNN"),
        ({"image_size": 30}, "vit cuts images into patches of 4 pixels, got 30; the nearest is 32"),
        ({"model_scale": 1.0}, "vit with 2 experts at r = 1 is not its backbone"),
        ({"growth": 12}, "growth 12 is an option of densenet, not of vit"),
    ],
)
def test_vit_refuses_what_it_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vit", width=0.125, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "resnet18", "depth": 34}, "depth 34 is an option of densenet and vit, not of resnet18"),
        ({"arch": "vgg16", "granularity": "token"}, "granularity token is an option of vit, not of vgg16"),
        ({"arch": "densenet", "depth": 99}, r"a depth of 6n \+ 4, got 99; the nearest is 100"),
        (
            {"arch": "densenet", "image_size": 224, "depth": 120},
            "169, 201, 264, got 120; the nearest is 121",
        ),
        ({"arch": "densenet", "growth": 0}, "growth must be at least 1 .*, got 0"),
        ({"arch": "vgg16", "image_size": 16}, "needs at least 32 pixels, got 16"),
        (
            {"arch": "vgg16", "kind": "s_dense", "num_experts": 4},
            "num_experts 4 has no effect on kind s_dense, which has no routers",
        ),
        (
            {"arch": "vgg16", "kind": "sparse_cnn", "granularity": "block"},
            "granularity block has no effect on kind sparse_cnn",
        ),
        (
            {"arch": "vgg16", "kind": "dense", "model_scale": 0.25},
            "model_scale 0.25 has no effect on kind dense, which is the full network; leave it out or use kind s_dense",
        ),
        ({"arch": "resnet18", "compact": True}, "only a sparse_cnn can be compact, got kind 'moe'"),
        ({"arch": "resnet18", "width": 0.02, "model_scale": 0.2}, "leaves no channel of a layer with 1"),
    ],
)
def test_backbones_refuse_options_that_are_not_theirs(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(**settings)
