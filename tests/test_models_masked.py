"""Sparse-CNN: the kept channels, learning of the scores, and the compact network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from grid import Cell

from advmoe.errors import ConfigError
from advmoe.evaluation.cost import measure_cost
from advmoe.models.channels import ChannelMask
from advmoe.models.layers import Conv2d, Linear, Norm
from advmoe.models.masked import compact, init_scores, mask_pathway
from advmoe.models.registry import create_model

ARCHITECTURES = ["densenet", "resnet18", "vgg16", "wrn28_10"]


def test_mask_keeps_the_channels_with_the_highest_scores() -> None:
    mask = ChannelMask(5, 2)
    mask.scores.data = torch.tensor([0.3, -1.0, 0.9, 0.1, 0.8])
    assert mask().tolist() == [0, 0, 1, 0, 1]
    assert mask.kept_channels().tolist() == [2, 4]


def test_gradient_passes_straight_through_the_mask_to_all_scores() -> None:
    mask = ChannelMask(4, 2)
    mask().mul(torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert mask.scores.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dropped_channels_do_not_matter(arch: str) -> None:
    model = Cell(arch, "sparse_cnn", 32).build().eval()
    images = Cell(arch, "sparse_cnn", 32).images()
    before = model(images)
    for module in model.modules():
        if isinstance(module, Conv2d | Norm | Linear) and module.writes.masked:
            dropped = torch.ones(module.writes.size, dtype=torch.bool)
            dropped[module.writes.kept_channels()] = False
            for value in (module.weight, getattr(module, "bias", None)):
                if value is not None:
                    value.data[dropped] = 7.0
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model_scale", [0.2, 0.5, 1.0])
def test_compact_network_has_equal_outputs_and_the_size_and_cost_of_s_dense(arch: str, model_scale: float) -> None:
    cell = Cell(arch, "sparse_cnn", 32)
    model = cell.build(model_scale=model_scale)
    for _ in range(2):  # BatchNorm statistics that are not those of a fresh network
        model(cell.images(8))
    model.eval()
    small = compact(model)
    torch.testing.assert_close(small(cell.images()), model(cell.images()))
    s_dense = measure_cost(Cell(arch, "s_dense", 32).build(model_scale=model_scale), 32)
    assert measure_cost(small, 32) == s_dense


def test_compacting_shares_nothing_with_the_model_and_draws_no_random_numbers() -> None:
    model = Cell("resnet18", "sparse_cnn", 32).build().eval()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = compact(model)
    assert torch.equal(torch.get_rng_state(), state)
    for value in small.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert compact(small) is small


def test_mask_pathway_names_backbone_channels_of_the_layers_that_moe_routes() -> None:
    cell = Cell("resnet18", "sparse_cnn", 32)
    model = cell.build().eval()
    pathway = mask_pathway(model)
    layouts = Cell("resnet18", "moe", 32).build().expert_layouts
    assert [len(channels) for channels in pathway] == [layout.size for layout in layouts]
    # the second convolutions of both blocks of a stage write one residual stream, so they keep the
    # same channels
    assert pathway[1] == pathway[3]
    assert pathway[0] != pathway[2]
    assert mask_pathway(compact(model)) == pathway


def test_scores_start_from_the_weights_that_read_the_channels() -> None:
    model = Cell("vgg16", "sparse_cnn", 32).build()
    reader = model.stages[0][1].conv
    reader.weight.data.fill_(1.0)
    reader.weight.data[:, 3] = 2.0
    init_scores(model)
    # all channels are read with equal norm, but for channel 3 with twice that; the largest score is
    # 1
    assert model.masks[0].scores.tolist() == pytest.approx([0.5] * 3 + [1.0] + [0.5] * 4)


def test_learning_scores_finds_the_channel_that_carries_the_label() -> None:
    torch.manual_seed(0)
    model = create_model("vgg16", kind="sparse_cnn", num_classes=2, width=0.0625, model_scale=0.5)
    mask = model.masks[-1]
    model.classifier.weight.data.zero_()
    useful = int(mask().argmin())  # a dropped channel, the only one the classifier looks at
    model.classifier.weight.data[:, useful] = torch.tensor([-1.0, 1.0])
    optimizer = torch.optim.SGD(model.mask_parameters(), lr=1.0)
    images = torch.rand(16, 3, 32, 32)
    labels = torch.ones(16, dtype=torch.long)  # after ReLU the channel is positive: it speaks for class 1
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert useful in mask.kept_channels().tolist()


@pytest.mark.parametrize("kind", ["dense", "s_dense", "moe"])
def test_only_a_sparse_cnn_can_be_compacted_or_has_a_mask_pathway(kind: str) -> None:
    model = Cell("resnet18", kind, 32).build()
    with pytest.raises(ConfigError, match=f"only a Sparse-CNN can be compacted, got a model of kind '{kind}'"):
        compact(model)
    with pytest.raises(ConfigError, match="only a Sparse-CNN has a mask pathway"):
        mask_pathway(model)
