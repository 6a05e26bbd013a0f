"""The routed convolution equals a reference that computes every expert for every image."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.models import convolution, moe_conv
from advmoe.models.channels import Channels
from advmoe.models.dispatch import row_products
from advmoe.models.experts import ExpertLayout
from advmoe.models.layers import Conv2d as PlainConv2d
from advmoe.models.moe_conv import Convolution, Form, MoEConv2d, moe_conv2d
from advmoe.models.network import RoutedNetwork
from advmoe.models.router import Router
from advmoe.models.routing import Decision, RoutingTape, Signal
from advmoe.models.rows import exchanges, shares, split_rows

LAYOUTS = {
    "gaps, N r < 1": ExpertLayout(num_channels=8, num_experts=2, model_scale=0.25),
    "halves, N r = 1": ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5),
    "overlap, N r > 1": ExpertLayout(num_channels=6, num_experts=3, model_scale=0.5),
    "wrap twice": ExpertLayout(num_channels=10, num_experts=3, model_scale=0.8),
    "whole, r = 1": ExpertLayout(num_channels=4, num_experts=2, model_scale=1.0),
    "two rows in each slot": ExpertLayout(num_channels=8, num_experts=4, model_scale=0.5),
    "shared": ExpertLayout(num_channels=8, num_experts=3, model_scale=0.5, shared=0.5),
    "separate": ExpertLayout(num_channels=6, num_experts=3, model_scale=0.5, separate=True),
    "one": ExpertLayout(num_channels=6, num_experts=1, model_scale=0.5),
}


def compute_all(layer: MoEConv2d, x_BCHW: Tensor, logits_BN: Tensor, chosen_B: Tensor, router_gradient: str) -> Tensor:
    """Every expert's channels cut out of one convolution with the whole bank; a one-hot gate keeps the chosen ones.

    With `advantage` the chosen ones are kept without a gate, and it multiplies their constant
    distance from the mean.
    """
    everything_BCHW = F.conv2d(x_BCHW, layer.weight, stride=layer.stride, padding=layer.padding)
    row_of = {channel: row for row, channel in enumerate(layer.layout.bank_channels)}
    experts_NBCHW = torch.stack(
        [
            everything_BCHW[:, [row_of[channel] for channel in layer.layout.channels(expert)]]
            for expert in range(layer.layout.num_experts)
        ]
    )
    probability_BN = logits_BN.softmax(dim=1)
    one_hot_BN = F.one_hot(chosen_B, layer.layout.num_experts)
    gate_BN = one_hot_BN * (probability_BN / probability_BN.detach())
    if router_gradient == "softmax":
        return torch.einsum("bn,nbchw->bchw", gate_BN, experts_NBCHW)
    distance_NBCHW = (experts_NBCHW - experts_NBCHW.mean(dim=0)).detach()
    kept_BCHW = torch.einsum("bn,nbchw->bchw", one_hot_BN.double(), experts_NBCHW)
    return kept_BCHW + torch.einsum("bn,nbchw->bchw", gate_BN - one_hot_BN, distance_NBCHW)


@pytest.mark.parametrize("router_gradient", ["softmax", "advantage"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_outputs_and_gradients_equal_those_of_computing_all_experts(
    name: str, kernel_size: int, stride: int, padding: int, router_gradient: str
) -> None:
    torch.manual_seed(0)
    layer = MoEConv2d(5, LAYOUTS[name], kernel_size, stride=stride, padding=padding).double()
    router = Router(5, LAYOUTS[name].num_experts, router_gradient=router_gradient).double()
    x_BCHW = torch.randn(24, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x_BCHW, layer.weight, *router.parameters()]

    decision = router.decide(x_BCHW)
    chosen_B = decision.expert_index_B
    assert len(chosen_B.unique()) == LAYOUTS[name].num_experts
    y_BCHW = layer(x_BCHW, decision)
    assert decision.logits_BN is not None
    reference_BCHW = compute_all(layer, x_BCHW, decision.logits_BN, chosen_B, router_gradient)
    torch.testing.assert_close(y_BCHW, reference_BCHW)

    toward_BCHW = torch.randn_like(y_BCHW)
    ours = torch.autograd.grad(y_BCHW, inputs, toward_BCHW, retain_graph=True)
    theirs = torch.autograd.grad(reference_BCHW, inputs, toward_BCHW)
    torch.testing.assert_close(ours, theirs)
    # At r = 1 all experts are the same, and which is chosen has no advantage.
    if LAYOUTS[name].num_experts > 1 and (LAYOUTS[name].model_scale < 1 or router_gradient == "softmax"):
        assert ours[2].abs().max() > 0, "the router must get a gradient"


def signals(outputs_NB: Tensor, toward_B: Tensor, chosen_B: Tensor, other_B: Tensor) -> dict[Signal, Tensor]:
    """The gradients of each kind of gate by their definitions, from all experts' outputs and the loss's gradient."""
    products_BN = (outputs_NB * toward_B).flatten(2).sum(dim=2).T
    own_B = products_BN.gather(1, chosen_B[:, None]).squeeze(1)
    return {
        "own": own_B,
        "mean": own_B - products_BN.mean(dim=1),
        "all": products_BN - own_B[:, None],
        "sampled": (products_BN - own_B[:, None]) * F.one_hot(other_B, len(outputs_NB)),
    }


@pytest.mark.parametrize("way", ["sorted", "all computed", "by groups", "by products", "by shares"])
@pytest.mark.parametrize("signal", ["own", "mean", "all", "sampled"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gate_learns_what_its_signal_names(
    monkeypatch: pytest.MonkeyPatch, name: str, signal: Signal, way: str
) -> None:
    monkeypatch.setattr("advmoe.models.moe_conv.computes_all", lambda *_: way == "all computed")
    if way == "by shares":
        monkeypatch.setattr(moe_conv, "HEAVY", 0)
    elif way.startswith("by"):
        monkeypatch.setattr(moe_conv, "TOGETHER", 0)
        monkeypatch.setattr(convolution, "PLACES", 1 if way == "by groups" else 1000)
        monkeypatch.setattr(convolution, "ROOM", 1)  # one image at a time
        monkeypatch.setattr(convolution, "IMAGES", 5)
        monkeypatch.setattr(convolution, "CACHED", 8 * 5 * 45 * 2)  # two filters at a time
        if signal != "own" and LAYOUTS[name].num_experts > 1:
            monkeypatch.setattr("advmoe.models.moe_conv.router_signal", None)  # not asked for
    torch.manual_seed(0)
    layer = MoEConv2d(5, LAYOUTS[name], 3, padding=1).double()
    experts = LAYOUTS[name].num_experts
    x_BCHW = torch.randn(12, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    chosen_B, other_B = torch.randint(experts, (12,)), torch.randint(experts, (12,))
    gate = torch.rand((12,) if signal in ("own", "mean") else (12, experts), requires_grad=True)

    y_BCHW = layer(x_BCHW, Decision(chosen_B, None, gate, signal, other_B))
    outputs_NB = torch.stack([layer(x_BCHW, Decision(torch.full((12,), e), None)) for e in range(experts)])
    chosen_BCHW = outputs_NB[chosen_B, torch.arange(12)]
    torch.testing.assert_close(y_BCHW, chosen_BCHW)
    toward_BCHW = torch.randn_like(y_BCHW)
    of_gate, of_x, of_weight = torch.autograd.grad(y_BCHW, [gate, x_BCHW, layer.weight], toward_BCHW)
    named = signals(outputs_NB.detach(), toward_BCHW, chosen_B, other_B)[signal]
    torch.testing.assert_close(of_gate, named.to(gate.dtype), atol=1e-4, rtol=1e-5)
    expected = torch.autograd.grad(chosen_BCHW, [x_BCHW, layer.weight], toward_BCHW)
    torch.testing.assert_close((of_x, of_weight), expected)


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("model_scale", [0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 8])
def test_exchanges_make_each_expert_from_the_first(num_experts: int, model_scale: float, shared: float) -> None:
    layout = ExpertLayout(num_channels=16, num_experts=num_experts, model_scale=model_scale, shared=shared)
    made = [list(layout.rows[0]) for _ in range(num_experts)]
    for exchange in exchanges(layout.rows):
        slots = [slot for run in exchange.slots for slot in range(run.start, run.stop)]
        assert len(slots) == len(exchange.rows) == sum(run.size for run in exchange.slots)
        assert list(exchange.instead_of) == [layout.rows[0][slot] for slot in slots]
        row_of = dict(zip(slots, exchange.rows, strict=True))
        for run in exchange.slots:
            assert 0 not in run.experts
            for expert in run.experts:
                made[expert][run.start : run.stop] = [row_of[slot] for slot in range(run.start, run.stop)]
    assert [tuple(rows) for rows in made] == list(layout.rows)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shares_hold_each_row_once_for_all_its_experts(layout: ExpertLayout) -> None:
    held = [
        (row, slot, expert)
        for share in shares(layout.rows)
        for row, slot in zip(range(share.start, share.stop), range(layout.size)[share.slots], strict=True)
        for expert in share.experts
    ]
    assert sorted(held) == sorted(
        (row, slot, expert) for expert, rows in enumerate(layout.rows) for slot, row in enumerate(rows)
    )


@pytest.mark.parametrize("images", [8, 1024])
def test_rows_are_convolved_once_for_all_their_experts_where_filters_are_heavy(images: int) -> None:
    # N = 8, r = 1/2: a bank of 16 filters, of which each expert has 8. 5 channels, 3x3 taps, 2x2 places:
    # all experts' filters have 8 * 8 * 45 numbers, inputs 20 for each image.
    layout = ExpertLayout(num_channels=16, num_experts=8, model_scale=0.5)
    layer = MoEConv2d(5, layout, 3, padding=1)
    x_BCHW, chosen_B = torch.rand(images, 5, 2, 2, requires_grad=True), torch.arange(images) % 8
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x_BCHW, Decision(chosen_B, None))
    convolved = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::convolution"]
    filters = sum(weight[0] for _, weight in convolved)
    work = sum(part[0] * weight[0] for part, weight in convolved)
    assert work == images * 8  # no image meets a filter that is not its own
    if moe_conv.HEAVY * 20 * images <= 8 * 8 * 45:
        # two filters are a share; three of eight shares belong to the last and the first experts, in two stretches
        assert filters == 16 + 3 * 2
    else:
        assert filters == 8 * 8


@pytest.mark.parametrize(("num_experts", "signal"), [(2, "all"), (8, "all"), (8, "sampled"), (8, "mean")])
def test_experts_that_share_their_rows_cost_one_more_in_a_comparison(num_experts: int, signal: Signal) -> None:
    # 16 images, 5 -> 8 channels, 3x3 taps, 6x6 places; at r = 1/2 each slot has two rows, whatever N is
    layout = ExpertLayout(num_channels=16, num_experts=num_experts, model_scale=0.5)
    layer = MoEConv2d(5, layout, 3, padding=1).double()
    x_BCHW = torch.rand(16, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    chosen_B = torch.arange(16) % num_experts
    gate = torch.ones((16,) if signal == "mean" else (16, num_experts), requires_grad=True)
    decision = Decision(chosen_B, None, gate, signal, (chosen_B + 1) % num_experts)
    convolutions, gradients = convolution_flops(lambda x: layer(x, decision), x_BCHW)
    one = 2 * 16 * 8 * 5 * 9 * 36
    assert convolutions == 2 * one  # the output and the comparison
    assert gradients == 2 * one  # by the input and by the filters


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("stride", "size"), [(1, 16), (2, 16), (1, 6), (2, 12)])
def test_products_with_all_experts_are_those_with_their_outputs(
    monkeypatch: pytest.MonkeyPatch, stride: int, size: int, biased: bool
) -> None:
    torch.manual_seed(0)
    rows = split_rows(range(20), 4)
    bias = torch.randn(20, dtype=torch.float64) if biased else None
    experts = Convolution(torch.randn(20, 3, 3, 3, dtype=torch.float64), bias, Form(rows, [stride] * 2, [1, 1]))
    x_BCHW = torch.randn(7, 3, size, size, dtype=torch.float64)
    gradient_BSHW = torch.randn(7, 4, size // stride, size // stride, dtype=torch.float64)
    monkeypatch.setattr(moe_conv, "ALONE", 1)
    monkeypatch.setattr(convolution, "ROOM", 8 * 27 * 4 * 3)  # 3 images at a time
    monkeypatch.setattr(convolution, "IMAGES", 3)
    monkeypatch.setattr(convolution, "CACHED", 8 * 27 * 3 * 3)  # 3 filters at a time
    expected_BN = torch.stack([(experts.output(e, x_BCHW) * gradient_BSHW).sum(dim=(1, 2, 3)) for e in range(5)], dim=1)
    monkeypatch.setattr(Convolution, "output", None)  # not asked for
    found_BN = experts.along_all(x_BCHW, gradient_BSHW)
    torch.testing.assert_close(found_BN - found_BN[:, :1], expected_BN - expected_BN[:, :1])


@pytest.mark.parametrize("number", [2, 4])
def test_gradients_by_image_sum_to_those_of_the_filters_and_biases(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    torch.manual_seed(0)
    layout = ExpertLayout(num_channels=8, num_experts=number, model_scale=0.5, separate=True)
    layer = MoEConv2d(3, layout, 3, stride=2, padding=1, affine=True).double()
    assert layer.affine is not None
    nn.init.normal_(layer.affine.shift)
    x_BCHW = torch.randn(11, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    chosen_B = torch.randint(number - 1, (11,))  # one expert has no image
    gate = torch.rand(11, number, dtype=torch.float64, requires_grad=True)
    inputs = [gate, x_BCHW, *layer.parameters()]
    toward = torch.randn(11, 4, 16, 16, dtype=torch.float64)

    def gradients(enough: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(moe_conv, "TOGETHER", enough)
        return torch.autograd.grad(layer(x_BCHW, Decision(chosen_B, None, gate, "all")), inputs, toward)

    torch.testing.assert_close(gradients(0), gradients(10**9))


def test_biases_and_their_gradients_by_shares_are_those_by_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    x_BCHW = torch.randn(11, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    chosen_B, toward = torch.randint(3, (11,)), torch.randn(11, 4, 5, 5, dtype=torch.float64)  # one expert has no image
    rows = LAYOUTS["two rows in each slot"].rows

    def found(heavy: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(moe_conv, "HEAVY", heavy)
        y_BSHW = moe_conv2d(x_BCHW, weight, bias, chosen_B, rows=rows, padding=1)
        return y_BSHW, *torch.autograd.grad(y_BSHW, [x_BCHW, weight, bias], toward)

    torch.testing.assert_close(found(0), found(10**9))


def test_a_compiled_layer_is_one_graph() -> None:
    torch.manual_seed(0)
    layer = MoEConv2d(5, LAYOUTS["overlap, N r > 1"], 3, padding=1)
    chosen_B, gate = torch.tensor([0, 2, 1, 1]), torch.ones(4, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer(x, Decision(chosen_B, None, gate, "mean"))

    x_BCHW = torch.randn(4, 5, 6, 6)
    compiled = torch.compile(run, backend="eager", fullgraph=True)(x_BCHW)
    torch.testing.assert_close(compiled, run(x_BCHW))
    inputs = [gate, layer.weight]
    torch.testing.assert_close(
        torch.autograd.grad(compiled.square().sum(), inputs), torch.autograd.grad(run(x_BCHW).square().sum(), inputs)
    )


def test_equal_experts_have_no_advantage() -> None:
    layer = MoEConv2d(3, LAYOUTS["separate"], 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:3].repeat(3, 1, 1, 1))
    gate = torch.ones(8, requires_grad=True)
    layer(torch.randn(8, 3, 6, 6), Decision(torch.arange(8) % 3, None, gate, "mean")).square().sum().backward()
    assert gate.grad is not None
    assert gate.grad.abs().max() < 1e-5


def test_a_layer_used_twice_in_one_graph_sums_its_gradients() -> None:
    torch.manual_seed(0)
    layer = MoEConv2d(4, LAYOUTS["halves, N r = 1"], 3, padding=1).double()
    x_BCHW = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    first_B, second_B = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 0, 0])

    (layer(layer(x_BCHW, Decision(first_B, None)), Decision(second_B, None)).square().sum()).backward()
    reference = layer.weight.detach().clone().requires_grad_()
    y = x_BCHW
    for chosen_B in (first_B, second_B):
        both = F.conv2d(y, reference, padding=1).unflatten(1, (2, 4))
        y = both[torch.arange(6), chosen_B]
    y.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.grad)


def test_an_attack_computes_no_weight_gradient() -> None:
    # 10 images, 3 -> 4 channels, 3x3 taps, 6x6 places: forward and input gradient 2 * 10 * 4 * 3 *
    # 9 * 36 FLOPs each
    layer = MoEConv2d(3, LAYOUTS["halves, N r = 1"], 3, padding=1).double().requires_grad_(False)
    x_BCHW = torch.rand(10, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    forward, backward = convolution_flops(lambda x: layer(x, Decision(torch.arange(10) % 2, None)), x_BCHW)
    assert forward == backward == 2 * 10 * 4 * 3 * 9 * 36
    # first layer, weights only
    layer.requires_grad_(True)
    forward, backward = convolution_flops(lambda x: layer(x.detach(), Decision(torch.arange(10) % 2, None)), x_BCHW)
    assert forward == backward == 2 * 10 * 4 * 3 * 9 * 36


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_in_memory_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    layer = MoEConv2d(5, LAYOUTS[name], 3, padding=1).double()
    x_BCHW = torch.randn(9, 5, 6, 6, dtype=torch.float64)
    chosen_B = torch.randint(LAYOUTS[name].num_experts, (9,))
    toward_BCHW = torch.randn(9, layer.out_channels, 6, 6, dtype=torch.float64)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = layer.to(memory_format=memory_format)
        x = x_BCHW.contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x, Decision(chosen_B, None))
        found.append((y, *torch.autograd.grad(y, [x, layer.weight], toward_BCHW)))
        assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(*found)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    layer = MoEConv2d(2, LAYOUTS["overlap, N r > 1"], 3, padding=1).double()
    x_BCHW = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    decision = Decision(torch.tensor([2, 0, 2, 1]), None)
    assert torch.autograd.gradcheck(lambda x, _: layer(x, decision), (x_BCHW, layer.weight))


@pytest.mark.parametrize("chosen", [[2, 0, 1, 2, 0], [1, 1, 1, 1, 1], [0, 2, 2, 0, 0]])
def test_outputs_come_back_in_batch_order(chosen: list[int]) -> None:
    # Image b is filled with b + 1 and expert e's 1x1 filters with 10^e: output b is (b + 1) 10^e in
    # both channels.
    experts = ExpertLayout(num_channels=6, num_experts=3, model_scale=1 / 3)
    layer = MoEConv2d(1, experts, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 1.0, 10.0, 10.0, 100.0, 100.0]).view(6, 1, 1, 1))
        x_BCHW = torch.arange(1.0, 6.0).view(5, 1, 1, 1)
        y_BCHW = layer(x_BCHW, Decision(torch.tensor(chosen), None))
    assert y_BCHW.flatten(1).tolist() == [[(b + 1) * 10.0**e] * 2 for b, e in enumerate(chosen)]


def test_weights_of_an_expert_without_images_get_no_gradient() -> None:
    layer = MoEConv2d(3, LAYOUTS["halves, N r = 1"], 3, padding=1)
    layer(torch.rand(4, 3, 5, 5), Decision(torch.ones(4, dtype=torch.int64), None)).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[:4].any()
    assert layer.weight.grad[4:].all()


def test_an_empty_batch_is_no_error() -> None:
    layer = MoEConv2d(3, LAYOUTS["halves, N r = 1"], 3, padding=1)
    y_BCHW = layer(torch.empty(0, 3, 5, 5), Decision(torch.empty(0, dtype=torch.int64), None))
    assert y_BCHW.shape == (0, 4, 5, 5)


def test_bias_stride_and_padding_are_those_of_an_ordinary_convolution() -> None:
    torch.manual_seed(0)
    x_BCHW, weight, bias = torch.randn(4, 4, 7, 7), torch.randn(8, 4, 3, 3), torch.randn(8)
    chosen_B = torch.tensor([1, 0, 1, 1])
    geometry = {"stride": 2, "padding": 2}
    y_BCHW = moe_conv2d(x_BCHW, weight, bias, chosen_B, rows=((0, 1, 2, 3), (4, 5, 6, 7)), **geometry)
    for b, expert in enumerate(chosen_B.tolist()):
        rows = slice(4 * expert, 4 * expert + 4)
        alone = F.conv2d(x_BCHW[b : b + 1], weight[rows], bias[rows], **geometry)
        torch.testing.assert_close(y_BCHW[b : b + 1], alone)


def test_the_exporters_operator_computes_what_eager_mode_computes() -> None:
    torch.manual_seed(0)
    arguments = (torch.randn(5, 3, 6, 6), torch.randn(6, 3, 3, 3), None, torch.tensor([2, 0, 1, 1, 2]))
    operator = torch.ops.advmoe.moe_conv2d
    rows = ((0, 1, 2), (3, 4, 2), (0, 4, 5))
    flat = [0, 1, 2, 3, 4, 2, 0, 4, 5]
    y_BCHW = operator(*arguments, flat, 3, [2, 2], [1, 1])
    eager = moe_conv2d(*arguments, rows=rows, stride=2, padding=1)
    assert torch.equal(y_BCHW, eager)
    torch.library.opcheck(
        operator.default,
        (*arguments, flat, 3, [2, 2], [1, 1]),
        test_utils=("test_schema", "test_faketensor"),
    )


def convolution_flops(run: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> tuple[int, int]:
    """Executed multiply-adds times two of all convolutions, (forward, backward).

    For layers in double precision: a gradient of narrow fp32 convolutions is a forward convolution
    (`advmoe.models.convolution`).
    """
    with FlopCounterMode(display=False) as counter:
        run(x_BCHW).sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    return by_operator[torch.ops.aten.convolution], by_operator[torch.ops.aten.convolution_backward]


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_only_the_chosen_expert_is_computed_in_training_too(num_experts: int) -> None:
    # 10 images, r C = 4 of 8 output channels, 3 input channels, 3x3 taps, 6x6 places: 2 * 10 * 4 *
    # 3 * 9 * 36 FLOPs, and twice that backward (input and weight gradient), whatever N.
    layout = ExpertLayout(num_channels=8, num_experts=num_experts, model_scale=0.5)
    layer = MoEConv2d(3, layout, 3, padding=1).double().train()
    x_BCHW = torch.rand(10, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    chosen_B = torch.arange(10) % num_experts
    forward, backward = convolution_flops(lambda x: layer(x, Decision(chosen_B, None)), x_BCHW)
    assert forward == 2 * 10 * 4 * 3 * 9 * 36
    assert backward == 2 * forward


def test_a_whole_moe_network_convolves_as_much_as_s_dense(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    s_dense = convolution_flops(tiny_vgg(kind="s_dense"), images)
    for num_experts in (1, 2, 4):
        model = tiny_vgg(num_experts=num_experts)
        model.routers.eval()  # a router that learns asks for the mean expert's output too
        assert convolution_flops(model, images) == s_dense


@pytest.mark.parametrize("model_scale", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_s_dense(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, model_scale: float, training: bool
) -> None:
    moe = tiny_vgg(num_experts=1, model_scale=model_scale).train(training)
    s_dense = tiny_vgg(kind="s_dense", model_scale=model_scale, seed=1).train(training)
    missing, unexpected = s_dense.load_state_dict(moe.state_dict(), strict=False)
    assert missing == []
    assert all(name.startswith("routers.") for name in unexpected)

    labels = torch.arange(8)
    logits, expected = moe(images), s_dense(images)
    assert torch.equal(logits, expected)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
    for name, parameter in s_dense.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    for name, buffer in s_dense.named_buffers():
        assert torch.equal(moe.get_buffer(name), buffer)
    # One expert leaves nothing to decide, so nothing to learn.
    assert all(not parameter.grad.any() for parameter in moe.router_parameters() if parameter.grad is not None)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 10])
@pytest.mark.parametrize("model_scale", [0.2, 0.5, 0.9, 1.0])
def test_any_number_of_experts_and_any_scale_train(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, num_experts: int, model_scale: float
) -> None:
    model = tiny_vgg(num_experts=num_experts, model_scale=model_scale)
    logits = model(images)
    assert logits.shape == (8, 10)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_strided_pointwise_convolution_never_reaches_the_kernel_that_overwrites_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN's weight gradient of a strided 1x1 convolution corrupts the heap (8 channels, channels-last)."""
    conv = PlainConv2d(Channels(8, 8), Channels(16, 16), 1, stride=2, padding=0)
    x = torch.randn(2, 8, 9, 9)
    expected = F.conv2d(x, conv.weight, stride=2)
    strides = []
    original = F.conv2d

    def spy(x: Tensor, weight: Tensor, bias: None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        strides.append(stride)
        return original(x, weight, bias, stride, padding)

    monkeypatch.setattr(F, "conv2d", spy)
    y = conv(x, RoutingTape(nn.ModuleList(), []))
    assert strides == [(1, 1)]
    torch.testing.assert_close(y, expected)


def test_no_rows_have_no_products() -> None:
    """A rank may have no image of a batch."""
    assert row_products(torch.empty(0, 3, 2, 2), torch.empty(0, 3, 2, 2)).shape == (0,)
