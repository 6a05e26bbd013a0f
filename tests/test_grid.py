"""Every combination of architecture, kind and image size trains, evaluates and exports."""

from pathlib import Path

import pytest
import torch
from advmoe_export import export_model
from grid import GRID, Cell

from advmoe.config import ModelConfig
from advmoe.evaluation.cost import measure_cost
from advmoe.models.masked import compact
from advmoe.training.checkpoint import Checkpoint, load, save_checkpoint


class Ledger:
    """Multiply-adds by the closed form, from the papers' tables and the definition of r alone."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.r = 1.0 if config.kind == "dense" else config.model_scale
        self.macs = 0

    def number(self, full: float) -> int:
        """Channels: rounded after the width multiplier, and again after r."""
        wide = int(full * self.config.width + 0.5)
        return int(wide * self.r + 0.5)

    def conv(self, reads: int, writes: int, kernel: int, places: int, *, routed: bool = False) -> None:
        """kernel^2 * C_in * C_out multiply-adds at each of places^2 outputs; a router is a linear layer C_in -> N."""
        self.macs += kernel**2 * reads * writes * places**2
        if routed and self.config.kind == "moe":
            self.macs += reads * self.config.num_experts

    def stem(self, writes: int) -> int:
        """3x3 at full size up to 64 pixels, 7x7 with stride 2 and a pool with stride 2 at 224; returns the new size."""
        size = self.config.image_size
        if size == 224:
            self.conv(3, writes, 7, 112)
            return 56
        self.conv(3, writes, 3, size)
        return size


def residual(ledger: Ledger, stem: int, stages: tuple[int, ...], blocks: int) -> None:
    size = ledger.stem(stem)
    reads = stem
    for stage, full in enumerate(stages):
        writes = ledger.number(full)
        size //= 1 if stage == 0 else 2
        for block in range(blocks):
            ledger.conv(reads, writes, 3, size, routed=True)
            ledger.conv(writes, writes, 3, size, routed=True)
            if block == 0 and (stage > 0 or stem != ledger.number(stages[0])):
                ledger.conv(reads, writes, 1, size)
            reads = writes
    ledger.conv(reads, ledger.config.num_classes, 1, 1)


def resnet18(ledger: Ledger) -> None:
    residual(ledger, ledger.number(64), (64, 128, 256, 512), 2)


def wrn28_10(ledger: Ledger) -> None:
    residual(ledger, int(16 * ledger.r + 0.5), (160, 320, 640), 4)


def vgg16(ledger: Ledger) -> None:
    size, reads = ledger.config.image_size, 3
    for convs, full in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(convs):
            ledger.conv(reads, ledger.number(full), 3, size, routed=reads != 3)
            reads = ledger.number(full)
        size //= 2
    if ledger.config.image_size == 224:
        hidden = ledger.number(4096)
        ledger.conv(reads * 7 * 7, hidden, 1, 1)
        ledger.conv(hidden, hidden, 1, 1)
        reads = hidden
    ledger.conv(reads, ledger.config.num_classes, 1, 1)


def densenet(ledger: Ledger) -> None:
    config = ledger.config
    growth = config.growth or 12
    blocks = (6, 12, 24, 16) if config.image_size == 224 else ((config.depth - 4) // 6,) * 3
    full = 2 * growth
    reads = ledger.number(full)
    size = ledger.stem(reads)
    for block, length in enumerate(blocks):
        if block > 0:
            full //= 2
            ledger.conv(reads, ledger.number(full), 1, size)
            reads, size = ledger.number(full), size // 2
        for _ in range(length):
            ledger.conv(reads, ledger.number(4 * growth), 1, size, routed=True)
            ledger.conv(ledger.number(4 * growth), ledger.number(growth), 3, size, routed=True)
            reads, full = reads + ledger.number(growth), full + growth
    ledger.conv(reads, config.num_classes, 1, 1)


def vit(ledger: Ledger) -> None:
    config = ledger.config
    patches = config.image_size // {32: 4, 64: 8, 224: 16}[config.image_size]
    tokens, dim, routed_rows = patches**2 + 1, 6 * int(64 * config.width), 1
    if config.granularity == "token":
        routed_rows = tokens
    ledger.conv(3, dim, config.image_size // patches, patches)
    for _ in range(config.depth):
        ledger.macs += tokens * 4 * dim * dim  # queries, keys, values, output
        ledger.macs += 2 * tokens * tokens * dim  # similarities, weighted sum of values
        ledger.macs += 2 * tokens * dim * int(4 * dim * ledger.r + 0.5)
        if config.kind == "moe":
            ledger.macs += routed_rows * dim * config.num_experts
    ledger.conv(dim, config.num_classes, 1, 1)


CLOSED_FORM = {"densenet": densenet, "resnet18": resnet18, "vgg16": vgg16, "vit": vit, "wrn28_10": wrn28_10}


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=[pytest.mark.slow] * (cell.image_size == 224)) for cell in GRID]
)
def test_every_cell_trains_costs_what_the_formula_says_and_survives_checkpoint_and_export(
    cell: Cell, tmp_path: Path
) -> None:
    model, images = cell.build(), cell.images()

    logits, routing = model.forward_with_routing(images)
    assert logits.shape == (2, 5)
    assert routing.expert_index_BL.shape == (2, len(model.expert_layouts) * model.rows_per_image)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all((p.grad != 0).any() for p in (*model.router_parameters(), *model.mask_parameters()))

    model.eval()
    expected = model(images)
    if cell.kind == "sparse_cnn":
        model = compact(model)
        torch.testing.assert_close(model(images), expected)
    ledger = Ledger(model.config)
    CLOSED_FORM[cell.arch](ledger)
    assert measure_cost(model, cell.image_size).gflops == pytest.approx(ledger.macs / 1e9, rel=1e-12)

    save_checkpoint(tmp_path / "model.pt", Checkpoint(model=model.config, weights=model.state_dict()))
    loaded = load(tmp_path / "model.pt")
    assert torch.equal(loaded(images), model(images))

    if cell.image_size == 224 and cell.kind != "moe":
        return  # its operators are those of the MoE network and of smaller images, and the file takes long to make
    # The exporter writes a file only if onnxruntime computes from it what the module computes.
    report = export_model(
        loaded,
        tmp_path / "model.onnx",
        image_size=cell.image_size,
        labels=("a", "b", "c", "d", "e"),
        allow_unrouted=cell.kind != "moe",
    )
    assert report.path.is_file()
    assert report.verification.difference < 1e-5
