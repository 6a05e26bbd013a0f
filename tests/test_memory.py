"""The memory of a training step: the estimate, and its comparison with the available memory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import MODEL, TRAIN, Observer, train
from torch import nn

from advmoe.config import Precision
from advmoe.data.sources import Dataset
from advmoe.errors import ConfigError
from advmoe.models.network import RoutedNetwork
from advmoe.training import memory
from advmoe.training.memory import Memory, activations, check_memory, estimate, validation_batch
from advmoe.world import World


class Small(nn.Module):
    """One convolution and a ReLU, whose activations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(1)
        self.conv = nn.Conv2d(3, 5, 1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu()


def test_activations_are_what_the_backward_pass_needs_and_no_weights() -> None:
    # the convolution keeps its input, 3 x 8 x 8 floats; ReLU its output, 5 x 8 x 8
    assert activations(Small(), 8) == 4 * (3 + 5) * 64  # type: ignore[arg-type]


def test_weights_that_are_computed_in_the_pass_do_not_count_once_per_image(
    tiny_vgg: Callable[..., RoutedNetwork],
) -> None:
    # a Sparse-CNN also keeps its masked weights, 3.7 MB, as much as 5 images; affine experts keep
    # their scaled filters
    width = 0.25
    dense, sparse = (
        activations(tiny_vgg(kind=kind, width=width, **more), 32)
        for kind, more in (("dense", {}), ("sparse_cnn", {"model_scale": 0.5}))
    )
    assert 0.99 * dense < sparse < 1.01 * dense
    plain, affine = (activations(tiny_vgg(width=width, expert_affine=affine), 32) for affine in (False, True))
    assert plain <= affine < 1.01 * plain


def test_a_step_in_bf16_takes_half_the_activations_and_an_attack_in_bf16_does_not_count(
    tiny_vgg: Callable[..., RoutedNetwork],
) -> None:
    assert activations(Small(), 8, half=True) == 2 * (3 + 5) * 64  # type: ignore[arg-type]
    model = tiny_vgg(kind="s_dense")

    def kept(precision: Precision) -> int:
        config = dataclasses.replace(TRAIN, limit_train=None, method="at", precision=precision)
        one, two = (estimate(model, dataclasses.replace(config, batch_size=size), 32).needed for size in (8, 9))
        return two - one - 4 * 4 * 3 * 32 * 32  # without the images and their gradients

    assert 0.45 * kept("fp32") < kept("bf16") < 0.6 * kept("fp32")
    assert kept("bf16_attack") == kept("fp32")


def test_an_estimate_grows_with_the_batch_and_the_passes(
    tiny_vgg: Callable[..., RoutedNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vgg()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def needed(**changes: object) -> int:
        return estimate(model, dataclasses.replace(TRAIN, **{"limit_train": None, **changes}), 32).needed  # type: ignore[arg-type]

    one_image = needed(batch_size=9) - needed(batch_size=8)
    assert needed(batch_size=128) - needed(batch_size=8) == 120 * one_image
    # clean and adversarial pass; both images of each, and their gradients, of 3 x 32 x 32 floats
    assert one_image == 2 * activations(model, 32) + 4 * 4 * 3 * 32 * 32
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert needed(ema=0.9) - needed() == weights
    assert needed() - 8 * one_image == 3 * weights, "with gradients and momentum"
    assert needed(loss="pgd_at") < 0.6 * needed()
    # the images of a batch in parts lie there at once, what is kept for the backward pass only of
    # one part
    assert needed(batch_size=8) - needed(batch_size=8, accumulate=4) == 6 * 2 * activations(model, 32)
    monkeypatch.setattr(memory, "world", lambda: World(rank=1, size=3))
    assert needed(batch_size=8) == needed(batch_size=9), "three ranks share 8 images as 2, 3 and 3"
    assert needed(batch_size=9) - 3 * one_image == 3 * weights
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("available", "warned", "refused"),
    [(None, False, False), (10**12, False, False), (1.2, True, False), (0.9, True, True)],
)
def test_what_may_not_fit_is_warned_of_and_what_cannot_is_refused(
    tiny_vgg: Callable[..., RoutedNetwork],
    monkeypatch: pytest.MonkeyPatch,
    available: float | None,
    warned: bool,
    refused: bool,
) -> None:
    needed = 20 * 10**9
    left = None if available is None else int(available * needed)
    monkeypatch.setattr(memory, "estimate", lambda *_: Memory(needed, left))
    if refused:
        with pytest.raises(ConfigError, match=r"a step takes about 20.0 GB of memory, 18.0 GB are .* batches of 8 ima"):
            check_memory(tiny_vgg(), TRAIN, 32)
        return
    found, warning = check_memory(tiny_vgg(), TRAIN, 32)
    assert found.needed == needed
    assert (warning is not None) == warned


def test_a_run_that_cannot_fit_writes_nothing(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    with pytest.raises(ConfigError, match="use smaller ones") as caught:
        train(digits, tmp_path / "run", model=MODEL, observer=Observer())
    assert caught.value.options == ("batch_size", "accumulate", "image_size", "width")
    assert not (tmp_path / "run").exists()


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory._free_of_group(tmp_path) == 3000
    # 1,200 of the 2,000 bytes are files that were read, which make room for others
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 900\nactive_file 300\nslab_reclaimable 0\n")
    assert memory._free_of_group(tmp_path) == 4200
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_of_group(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert memory._free_of_machine(tmp_path / "meminfo") == 7 * 1024
    assert memory._free_of_machine(tmp_path / "none") is None


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_of_machine", lambda _: 9000)
    monkeypatch.setattr(memory, "_free_of_group", lambda _: 8000)
    assert memory.available(torch.device("cpu")) == 8000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(torch.device("cpu")) == 2000


def test_large_images_are_validated_in_batches_no_larger_than_those_of_training() -> None:
    assert [validation_batch(128, size) for size in (32, 64, 224)] == [256, 128, 128]
    assert validation_batch(8, 224) == 8
