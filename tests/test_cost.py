"""Latency: measured for every requested batch size, per image, on different images."""

import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from advmoe.evaluation import cost
from advmoe.evaluation.cost import hardware, measure_latency


class Sleeper(nn.Module):
    """Takes 4 ms for any batch, and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(images)
        time.sleep(0.004)
        return images.mean(dim=(1, 2, 3)) * self.weight


def test_batch_sizes_take_turns_and_latency_is_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LATENCY_SECONDS", 0.0)  # so the least number of runs
    model, images = Sleeper(), torch.rand(8, 3, 2, 2)
    found = measure_latency(model, images, (1, 8))
    # One run that does not count for each, then three in turns.
    sizes = [len(batch) for batch in model.seen]
    assert sizes == [1, 8] * 4
    assert found.keys() == {1, 8}
    # Sleeping may take longer on a busy machine, never shorter: 4 ms for one image, 4 ms / 8 for
    # one of eight.
    assert found[1] >= 4.0
    assert found[8] >= 0.5
    assert found[1] == pytest.approx(8 * found[8], rel=0.9)
    single = [batch for batch in model.seen[2:] if len(batch) == 1]
    assert all(not torch.equal(one, other) for one, other in pairwise(single))
    assert model.training
    assert model.weight.requires_grad


def test_the_hardware_has_a_name() -> None:
    name, _, threads = hardware(torch.device("cpu")).rpartition(", ")
    assert name
    assert threads == f"{torch.get_num_threads()} threads"
