"""Forms of the MoE layer beyond the paper: training, cost, checkpoints and export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from advmoe_export import export_model
from grid import Cell
from test_grid import CLOSED_FORM, Ledger
from torch import Tensor

import advmoe
from advmoe.attacks.pathways import RouteAttackConfig
from advmoe.attacks.relaxations import routing_views
from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.loader import Batch
from advmoe.data.sets import ImageSet
from advmoe.errors import ConfigError
from advmoe.evaluation.controls import controlled
from advmoe.evaluation.cost import measure_cost
from advmoe.evaluation.pathways import mask_of
from advmoe.evaluation.results import PGD, SuiteConfig
from advmoe.evaluation.suite import run_suite
from advmoe.models.experts import ExpertLayout
from advmoe.models.layers import Conv2d, Linear
from advmoe.models.masked import close_masks, open_masks
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Decision
from advmoe.seeding import generator_for
from advmoe.training.checkpoint import Checkpoint, load, save_checkpoint
from advmoe.training.coupling import expert_banks, start_equal
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS
from advmoe.training.start import _draw_anew, has_other_classes, start_from, with_new_classifier

MakeNetwork = Callable[..., RoutedNetwork]


@dataclass(frozen=True)
class Form:
    """One way of building and training experts that the paper does not have."""

    arch: str
    model: dict[str, Any]
    train: dict[str, Any]
    starts_from: str | None = None
    """Kind of the trained network that the experts are copies of."""

    def __str__(self) -> str:
        settings = {**self.model, **self.train, "init": self.starts_from or "fresh"}
        return "-".join((self.arch, *(f"{key}={value}" for key, value in settings.items())))


FORMS = [
    Form("vgg16", {"routed": "last-2-stages", "router_gradient": "value"}, {"attack_routing": "margin"}),
    Form(
        "vgg16",
        {"shared": 0.5, "num_experts": 3, "router_gradient": "relative"},
        {"attack_routing": "mixture", "reinitialize": 0.5, "router_lr": 0.5},
        "s_dense",
    ),
    Form(
        "resnet18",
        {"shared": 1.0, "expert_affine": True, "granularity": "block", "router_gradient": "value"},
        {"method": "at", "attack_routing": "mixture"},
    ),
    Form(
        "wrn28_10",
        {"routed": "last-3-blocks", "expert_affine": True, "router_gradient": "sampled"},
        {"router_step": "reuse"},
        "dense",
    ),
    Form(
        "densenet",
        {"routed": "last-1-stages", "shared": 0.25, "router_gradient": "value"},
        {"reinitialize": 0.25, "router_statistics": "batch"},
        "sparse_cnn",
    ),
    Form(
        "vit",
        {"routed": "last-1-blocks", "shared": 0.5, "granularity": "token", "router_gradient": "value"},
        {"attack_routing": "margin", "reinitialize": 0.5},
        "dense",
    ),
]
"""Every option of the forms at least once, and every backbone."""
SUITE = SuiteConfig(
    attack=AttackConfig(steps=1),
    diagnosed=0,
    temperatures=(1.0,),
    pathways=1,
    route=RouteAttackConfig(sampled=1, greedy=1),
)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_trains_costs_what_it_should_and_survives_evaluation_checkpoint_and_export(
    form: Form, tmp_path: Path
) -> None:
    cell = Cell(form.arch, "moe", 32)
    model, images = cell.build(**form.model), cell.images(4)
    if form.starts_from is not None:
        source = Cell(form.arch, form.starts_from, 32).build()
        if form.starts_from == "sparse_cnn":
            close_masks(source)
        start = Checkpoint(model=source.config, weights=source.state_dict())
        start_from(model, start, reinitialize=form.train.get("reinitialize", 0.0))
    config = TrainConfig(
        dataset="digits", batch_size=4, weight_decay=0.0, init=form.starts_from and "0" * 64, **form.train
    )
    method = METHODS[config.method]
    levels = make_levels(method.levels, model, config, fresh=form.starts_from is None)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batch = Batch(images, torch.tensor([0, 1, 2, 3]), torch.arange(4))
    for step in range(2):
        noise = [torch.Generator().manual_seed(step)] * len(levels)
        method.step(levels, [batch] * len(levels), config, noise, step)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name

    # A pathway costs what S-Dense costs, and each router a linear layer. Scaling and shifting cost
    # nothing.
    options = {"depth": cell.config().depth} if cell.config().depth else {}
    reference = Ledger(Cell(form.arch, "s_dense", 32).config(**options))
    CLOSED_FORM[form.arch](reference)
    rows = model.rows_per_image if model.config.granularity == "token" else 1
    of_routers = sum(rows * router.linear.weight.numel() for router in model.routers)  # type: ignore[union-attr, operator]
    assert measure_cost(model, 32).gflops == pytest.approx((reference.macs + of_routers) / 1e9, rel=1e-12)

    for name, parameter in model.named_parameters():
        if "affine" in name:  # two steps from zero they are so small that a mistake in the export might not show
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    with torch.no_grad():
        logits, routing = model.forward_with_routing(images)
        # what an attack looks at has the model's own outputs, and so has its pathway when it is
        # given
        for name, forward in routing_views(model).items():
            torch.testing.assert_close(forward(images, torch.arange(4)), logits, msg=name)
        torch.testing.assert_close(model(images, routing.expert_index_BL), logits)
        torch.testing.assert_close(model.folded()(images), logits, atol=1e-5, rtol=1e-4)
    pixels = (255 * images).round().byte()
    with torch.no_grad():
        right = ImageSet(
            images=pixels.permute(0, 2, 3, 1).contiguous().numpy(),
            labels=model(pixels / 255).argmax(dim=1).numpy(),
            class_names=tuple("abcde"),
        )
    found = run_suite(model, right, SUITE)
    assert found.sa == 1.0
    assert found.ra(*found.table) <= found.ra(PGD)
    assert found.ran("view", "route")
    save_checkpoint(tmp_path / "model.pt", Checkpoint(model=model.config, weights=model.state_dict()))
    loaded = load(tmp_path / "model.pt")
    assert torch.equal(loaded(images), model(images))
    report = export_model(loaded, tmp_path / "model.onnx", image_size=32, labels=("a", "b", "c", "d", "e"))
    assert report.verification.difference < 1e-5


def test_scales_and_shifts_of_experts_add_nothing_to_the_exported_network(
    tiny_vgg: MakeNetwork, tmp_path: Path
) -> None:
    made = {}
    for affine in (True, False):
        path = tmp_path / f"{affine}.onnx"
        export_model(tiny_vgg(warm=True, expert_affine=affine).eval(), path, image_size=32, labels=tuple("abcdefghij"))
        graph = onnx.load(path).graph
        made[affine] = [node.op_type for node in graph.node], [list(value.dims) for value in graph.initializer]
    assert made[True] == made[False]


def test_the_last_stages_are_routed_and_the_others_are_s_dense(tiny_vgg: MakeNetwork) -> None:
    model = tiny_vgg(routed="last-2-stages")
    assert len(model.expert_layouts) == 6  # VGG-16 ends with two stages of three convolutions
    assert model.routed_places == [6, 7, 8, 9, 10, 11]
    assert len(tiny_vgg(routed="last-4-blocks").expert_layouts) == 4
    s_dense = dict(tiny_vgg(kind="s_dense").named_parameters())
    kept = {name: value.shape for name, value in model.named_parameters() if name.startswith("stages.2")}
    assert kept == {name: s_dense[name].shape for name in kept}


def test_a_mask_is_compared_with_the_layers_that_are_routed(tiny_vgg: MakeNetwork) -> None:
    sparse = tiny_vgg(kind="sparse_cnn")
    close_masks(sparse)
    whole, part = (mask_of(sparse, tiny_vgg(routed=routed)) for routed in ("all", "last-1-stages"))
    assert part.tolist() == whole[-3 * 32 :].tolist()


@pytest.mark.parametrize(
    ("routed", "message"),
    [
        ("last-6-stages", "vgg16 has 5 stages here, so its last 6 cannot be routed"),
        ("first-2-stages", "the routed part must be all, last-N-stages or last-N-blocks, got 'first-2-stages'"),
    ],
)
def test_a_part_that_is_not_there_is_refused(routed: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        advmoe.create_model("vgg16", routed=routed)


def test_shared_filters_come_first_in_every_expert_and_windows_share_out_the_rest() -> None:
    # r C = 4 slots, of which 2 are common; the other 6 channels are shared out in windows of 2 from
    # 0, 2 and 4 on
    layout = ExpertLayout(num_channels=8, num_experts=3, model_scale=0.5, shared=0.5)
    assert [layout.channels(expert) for expert in range(3)] == [(0, 1, 2, 3), (0, 1, 4, 5), (0, 1, 6, 7)]
    separate = ExpertLayout(num_channels=8, num_experts=3, model_scale=0.5, shared=0.5, separate=True)
    assert separate.bank_channels == tuple(range(8))


def test_experts_that_share_all_filters_differ_by_scale_and_shift_alone(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    model = tiny_vgg(warm=True, shared=1.0, expert_affine=True).eval()
    assert not list(expert_banks(model))  # nothing to couple
    last = next(module for module in reversed(list(model.modules())) if isinstance(module, MoEConv2d))
    assert last.affine is not None
    first, second = (torch.full((8, 12), expert) for expert in (0, 1))
    torch.testing.assert_close(model(images, first), model(images, second))
    x = torch.rand(2, last.in_channels, 4, 4)
    plain, index = F.conv2d(x, last.weight, padding=1), torch.tensor([0, 1])
    with torch.no_grad():
        last.affine.scale[1], last.affine.shift[1] = 0.5, 3.0
        y = MoEConv2d.forward(last, x, Decision(index, None))
    torch.testing.assert_close(y[0], plain[0])
    torch.testing.assert_close(y[1], 1.5 * plain[1] + 3.0)


def test_the_average_of_experts_includes_their_scales_and_shifts(tiny_vgg: MakeNetwork) -> None:
    model = tiny_vgg(shared=1.0, expert_affine=True)
    first = next(module for module in model.modules() if isinstance(module, MoEConv2d))
    assert first.affine is not None
    with torch.no_grad():  # scales 1 and 3, whose mean is 2
        first.affine.scale[1], first.affine.shift[1] = 2.0, 4.0
    averaged = next(m for m in controlled(model, "averaged", 0, calibration=()).modules() if isinstance(m, MoEConv2d))
    assert averaged.bias is not None
    torch.testing.assert_close(averaged.weight[: averaged.out_channels], 2.0 * first.weight)
    torch.testing.assert_close(averaged.bias[: averaged.out_channels], torch.full((averaged.out_channels,), 2.0))


def test_sharing_everything_needs_something_that_differs() -> None:
    with pytest.raises(ConfigError, match=r"shared 1 leaves nothing that sets the experts apart"):
        ModelConfig(arch="vgg16", shared=1.0)
    with pytest.raises(ConfigError, match="expert_affine is an option of the CNNs, not of vit"):
        ModelConfig(arch="vit", expert_affine=True)


def test_a_value_gate_scales_the_output_and_has_its_true_derivative(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    model = tiny_vgg(warm=True, router_gradient="value").eval().double()
    x = images.double().requires_grad_()
    logits, routing = model.forward_with_routing(x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    step = 1e-6
    with torch.no_grad():  # along the pathway taken, whose probabilities change with the image
        ahead, behind = (model(x + sign * step * direction, routing.expert_index_BL).sum() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-4)


@pytest.mark.parametrize("arch", ["vgg16", "densenet", "vit"])
@pytest.mark.parametrize("kind", ["s_dense", "sparse_cnn", "dense"])
def test_experts_start_from_a_network_without_experts(arch: str, kind: str) -> None:
    if (arch, kind) == ("vit", "sparse_cnn"):
        return
    source, images = Cell(arch, kind, 32).build(), Cell(arch, kind, 32).images(8)
    source(images)
    if kind == "sparse_cnn":
        close_masks(source)
    initial = Checkpoint(model=source.config, weights=source.state_dict())
    model = Cell(arch, "moe", 32).build(num_experts=3, expert_filters="separate")
    start_from(model, initial)
    model.eval()
    if kind == "dense":  # one pathway of it, not the whole
        if arch == "vit":
            mlp, own = source.blocks[0].mlp, model.blocks[0].mlp  # type: ignore[index, union-attr]
            assert torch.equal(
                own.expand.weight[: len(mlp.expand.weight) // 2], mlp.expand.weight[: len(mlp.expand.weight) // 2]
            )
        return
    torch.testing.assert_close(model(images), initial.build()(images))


@pytest.mark.parametrize("arch", ["densenet", "resnet18", "vgg16", "vit", "wrn28_10"])
@pytest.mark.parametrize(("of", "to"), [("moe", "moe"), ("s_dense", "moe"), ("dense", "moe"), ("dense", "sparse_cnn")])
def test_every_network_may_start_with_a_classifier_for_other_classes(arch: str, of: str, to: str) -> None:
    if (arch, to) == ("vit", "sparse_cnn"):
        return
    source = Cell(arch, of, 32).build()
    given = Checkpoint(model=source.config, weights=source.state_dict(), class_names=tuple("abcde"))
    assert has_other_classes(given, 3, ())
    assert has_other_classes(given, 5, tuple("ABCDE"))
    assert not has_other_classes(given, 5, ())
    initial = with_new_classifier(given, 3, tuple("xyz"))
    assert initial.class_names == ("x", "y", "z")
    shared = {name for name, value in initial.weights.items() if value is given.weights[name]}
    assert set(given.weights) - shared == {"classifier.weight", "classifier.bias"}
    model = Cell(arch, to, 32).build(num_classes=3)
    start_from(model, initial)
    assert model.eval()(Cell(arch, to, 32).images(2)).shape == (2, 3)


@pytest.mark.parametrize("arch", ["vgg16", "resnet18", "densenet"])
def test_experts_start_with_their_own_windows_of_a_dense(arch: str) -> None:
    source, sparse, model = (Cell(arch, kind, 32).build() for kind in ("dense", "sparse_cnn", "moe"))
    windows = {name: layer.layout for name, layer in model.named_modules() if isinstance(layer, MoEConv2d)}
    convolutions = {name: layer for name, layer in sparse.named_modules() if isinstance(layer, Conv2d)}
    weights = {name: value.clone() for name, value in source.state_dict().items()}
    for name, layer in sparse.named_modules():  # what all experts share must not depend on the channels
        if isinstance(layer, Conv2d | Linear) and name not in windows:
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = torch.full_like(weight, weight.abs().mean().item())
    sparse.load_state_dict(sparse.state_dict() | weights)
    close_masks(sparse)
    divided = {
        sparse.routable[place].masks[0]: layout
        for place, layout in zip(model.routed_places, model.expert_layouts, strict=True)
    }
    start_from(model, Checkpoint(model=source.config, weights=weights), upcycling="windows")
    images = Cell(arch, "moe", 32).images(4)
    for expert in range(2):
        # The pathway of an expert is the Dense in which all filters outside its windows are zero:
        # without training, BatchNorm passes zeros on.
        left = dict(weights)
        for name, layer in convolutions.items():
            mask = layer.writes.masks[0]
            kept = list(divided[mask].channels(expert)) if mask in divided else mask.kept_channels()
            left[f"{name}.weight"] = torch.zeros_like(weights[f"{name}.weight"])
            left[f"{name}.weight"][kept] = weights[f"{name}.weight"][kept]
        source.load_state_dict(left)
        expected = source.eval()(images)
        assert expected.std(dim=0).max() > 0
        pathway_BL = torch.full((4, len(windows)), expert)
        torch.testing.assert_close(model.eval()(images, pathway_BL), expected, rtol=1e-4, atol=1e-5)


def test_what_experts_share_starts_with_the_mean_of_their_windows(tiny_vgg: MakeNetwork) -> None:
    source = tiny_vgg(kind="dense", warm=True)
    model = tiny_vgg()
    start_from(model, Checkpoint(model=source.config, weights=source.state_dict()), upcycling="windows")
    ours, theirs = model.state_dict(), source.state_dict()
    (name,) = [name for name in theirs if name.startswith("stages.0.1.") and name.endswith("running_mean")]
    assert torch.equal(ours[name], theirs[name].reshape(2, -1).mean(dim=0))


def test_windows_of_a_dense_have_to_exist(tiny_vgg: MakeNetwork) -> None:
    dense = tiny_vgg(kind="dense")
    initial = Checkpoint(model=dense.config, weights=dense.state_dict())
    for overlapping in ({"num_experts": 3}, {"shared": 0.5}, {"num_experts": 4, "expert_filters": "separate"}):
        with pytest.raises(ConfigError, match="needs experts that divide the channels of a Dense") as caught:
            start_from(tiny_vgg(**overlapping), initial, upcycling="windows")
        assert caught.value.options == ("upcycling",)
    small = tiny_vgg(kind="s_dense")
    with pytest.raises(
        ConfigError, match="upcycling windows cuts a Dense into experts; this checkpoint holds kind s_d"
    ):
        start_from(tiny_vgg(), Checkpoint(model=small.config, weights=small.state_dict()), upcycling="windows")
    with pytest.raises(ConfigError, match="upcycling windows has no effect on fresh weights"):
        TrainConfig(dataset="digits", upcycling="windows")


def test_experts_that_share_filters_in_other_places_do_not_start_as_copies(tiny_vgg: MakeNetwork) -> None:
    many: dict[str, Any] = {"num_experts": 6, "model_scale": 0.6}
    source = tiny_vgg(kind="s_dense", model_scale=0.6, warm=True)
    initial = Checkpoint(model=source.config, weights=source.state_dict())
    with pytest.raises(ConfigError, match="they cannot all start as one copy; use expert_filters separate") as caught:
        start_from(tiny_vgg(**many), initial)
    assert caught.value.options == ("init",)
    model = tiny_vgg(**many, expert_filters="separate")
    start_from(model, initial)
    images = torch.rand(2, 3, 32, 32)
    for expert in range(6):
        pathway_BL = torch.full((2, len(model.expert_layouts)), expert)
        torch.testing.assert_close(model.eval()(images, pathway_BL), source.eval()(images))


def test_all_filters_but_those_of_all_experts_can_be_drawn_anew(tiny_vgg: MakeNetwork) -> None:
    # At N = 3, r = 0.8 no slot has two filters that keep it, so nothing is coupled. Yet a filter that
    # one expert lacks is the others' own.
    model = tiny_vgg(num_experts=3, model_scale=0.8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _draw_anew(model, 1.0, generator_for(0))
    for name, layer in model.named_modules():
        if isinstance(layer, MoEConv2d):
            kept = (layer.weight == before[f"{name}.weight"]).flatten(1).all(dim=1)
            of_all = set(layer.rows[0]) & set(layer.rows[1]) & set(layer.rows[2])
            assert 0 < len(of_all) < len(layer.weight)
            assert set(kept.nonzero().squeeze(1).tolist()) == of_all


def test_experts_do_not_start_from_a_sparse_cnn_in_its_dense_phase(tiny_vgg: MakeNetwork) -> None:
    source = tiny_vgg(kind="sparse_cnn")
    open_masks(source)
    initial = Checkpoint(model=source.config, weights=source.state_dict())
    with pytest.raises(ConfigError, match=r"a Sparse-CNN with learned masks .*, got one that is still dense") as caught:
        start_from(tiny_vgg(), initial)
    assert caught.value.options == ("init",)


def test_a_share_of_each_experts_filters_is_drawn_anew(tiny_vgg: MakeNetwork) -> None:
    source = tiny_vgg(kind="s_dense", width=0.25)
    initial = Checkpoint(model=source.config, weights=source.state_dict())
    model = tiny_vgg(width=0.25, shared=0.25)
    start_from(model, initial, reinitialize=0.5)
    bank, slots = list(expert_banks(model))[-1]
    copy = source.state_dict()["stages.4.2.conv.weight"]
    changed = torch.tensor([not torch.equal(row, copy[slot]) for row, slot in zip(bank, slots.slot_of_F, strict=True)])
    own = slots.count_S[slots.slot_of_F] > 1
    assert 0.35 < changed[own].double().mean() < 0.65
    assert not changed[~own].any()
    again = tiny_vgg(width=0.25, shared=0.25)
    start_from(again, initial, reinitialize=0.5)
    assert torch.equal(list(expert_banks(again))[-1][0], bank)
    start_equal(again)  # an MoE network is not drawn anew
    with pytest.raises(ConfigError, match=r"reinitialize 0.5 is for experts that start from S-Dense"):
        start_from(again, Checkpoint(model=again.config, weights=again.state_dict()), reinitialize=0.5)


def test_upcycled_experts_are_trained_as_they_are(tiny_vgg: MakeNetwork) -> None:
    config = TrainConfig(dataset="digits", init="0" * 64, reinitialize=0.5)
    model = tiny_vgg()
    before = [weight.clone() for weight, _ in expert_banks(model)]
    make_levels(["routers", "experts"], model, config, fresh=False)
    assert all(torch.equal(weight, old) for (weight, _), old in zip(expert_banks(model), before, strict=True))
    with pytest.raises(ConfigError, match=r"reinitialize 0.5 has no effect on fresh weights"):
        TrainConfig(dataset="digits", reinitialize=0.5)
