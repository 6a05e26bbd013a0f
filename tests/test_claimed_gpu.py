"""Commands on a GPU: no tensor is left on the CPU. Checked without a GPU, on one that only claims to be one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from claimed_gpu import claimed_gpu
from torch import nn

from advmoe import create_model
from advmoe.attacks.relaxations import mixture_view
from advmoe.cli.app import main
from advmoe.evaluation.cost import measure_cost


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with claimed_gpu():
        yield


def test_tensors_of_two_devices_do_not_meet() -> None:
    x = torch.rand(3, 2, device="cuda")
    assert (x.is_cuda, str(x.device), x[0].sum().is_cuda) == (True, "cuda:0", True)
    with pytest.raises(RuntimeError, match="found cuda:0 and the CPU"):
        x + torch.rand(3, 2)
    with pytest.raises(RuntimeError, match="found cuda:0 and the CPU"):
        torch.rand(3, 2)[torch.tensor([0], device="cuda")]
    with pytest.raises(RuntimeError, match="found cuda:0 and the CPU"):
        x[[0, 1]] = torch.rand(2, 2)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator of cuda"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    assert torch.equal(x[torch.tensor([2])].cpu(), x.cpu()[2:]), "indices may be on the CPU"
    assert torch.equal((x * torch.tensor(2.0)).cpu(), x.cpu() * 2), "and so may single numbers"
    x[:, 1] = 0
    assert x.tolist() == [[row[0], 0.0] for row in x.cpu().tolist()]


def test_gradients_cross_devices() -> None:
    layer = nn.Linear(2, 1).to("cuda")
    x = torch.ones(4, 2, requires_grad=True)
    layer(x.to("cuda")).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    assert layer.weight.grad.tolist() == [[4.0, 4.0]]
    assert x.grad is not None
    assert not x.grad.is_cuda
    assert np.allclose(x.grad.numpy(), layer.weight.detach().cpu().numpy())


def test_a_gpu_counts_the_operations_of_one_expert() -> None:
    model = create_model("vgg16", width=0.0625)
    on_cpu = measure_cost(model, 32)
    assert measure_cost(model.to("cuda"), 32) == on_cpu


@pytest.mark.parametrize("number", [2, 4])
def test_the_gradient_of_the_mixture_is_that_of_a_cpu(number: int) -> None:
    torch.manual_seed(0)
    model = create_model("vgg16", width=0.125, num_experts=number, model_scale=1 / number).double().eval()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        x = images.to(device).requires_grad_()
        logits = mixture_view(model.to(device))(x, torch.arange(4, device=device))
        found.append((logits.cpu().detach(), torch.autograd.grad(logits.square().sum(), x)[0].cpu()))
    for of_cpu, of_gpu in zip(*found, strict=True):
        torch.testing.assert_close(of_gpu, of_cpu, rtol=1e-9, atol=1e-12)


def advmoe(*arguments: object) -> None:
    assert main([*map(str, arguments), "--device", "cuda"]) == 0


def train(out: Path, *options: object) -> None:
    small = ("--width", 0.0625, "--epochs", 1, "--limit-train", 16, "--batch-size", 8, "--val-limit", 16)
    advmoe("train", "digits", "--arch", "vgg16", *small, "--steps", 1, "--out", out, *options)


TRAININGS = {
    "the default": "",
    "four experts": "--num-experts 4 --model-scale 0.25 --granularity stage --router-gradient sampled",
    "four experts in bf16": "--num-experts 4 --precision bf16",
    "a router per image": "--granularity image --attack-routing mixture --router-step reuse --router-share 0.5",
    "scaled outputs": "--granularity block --router-gradient value --shared 1.0 --expert-affine --method at",
    "the last stage": "--routed last-1-stages --attack-routing margin --ema 0.9 --balance 0.01 --awp 0.005",
    "batch statistics": "--router-statistics batch --router-gradient straight_through --precision bf16",
    "a transformer": "--arch vit --accumulate 2",
    "PGD-AT": "--kind s_dense --method at --loss pgd_at --precision bf16_attack",
    "masks": "--kind sparse_cnn --method at_sparse --epochs 2",
    "no attack": "--kind dense --method standard",
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_runs_on_a_gpu(name: str, tmp_path: Path) -> None:
    train(tmp_path / "run", *TRAININGS[name].split())


def test_a_training_that_starts_from_another_one_or_goes_on_runs_on_a_gpu(tmp_path: Path) -> None:
    train(tmp_path / "dense", "--kind", "dense", "--method", "standard")
    train(tmp_path / "upcycled", "--init", tmp_path / "dense", "--reinitialize", 0.5, "--num-experts", 4)
    train(tmp_path / "masks", "--init", tmp_path / "dense", "--kind", "sparse_cnn", "--method", "mask_at")
    train(tmp_path / "upcycled", "--init", tmp_path / "dense", "--reinitialize", 0.5, "--num-experts", 4, "--resume")


def test_evaluation_runs_on_a_gpu(tmp_path: Path) -> None:
    run, masks = tmp_path / "run", tmp_path / "masks"
    train(run)
    train(masks, "--kind", "sparse_cnn", "--method", "at_sparse", "--epochs", 2)
    few = ("--limit-eval", 6, "--steps", 2, "--diagnose", 4)
    routing = ("--routing", "--eps-sweep", "4/255,8/255", "--mask", masks)
    advmoe("evaluate", run, *few, *routing, "--latency", "--out", tmp_path / "card")
    advmoe("evaluate", run, *few, "--control", "random", "--control", "averaged")
    advmoe("compare", run, masks, *few)
    advmoe("evaluate", masks, "--limit-eval", 2, "--steps", 2, "--diagnose", 0, "--autoattack")
