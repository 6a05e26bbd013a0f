"""The cost of a model: parameters, executed multiply-adds of one inference, and time."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.models.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a model.

    `gflops` counts as the paper's tables do: a multiplication with its addition is one operation (1
    GFLOP = 1e9 multiply-adds). Convolutions, linear layers and attention are counted; elementwise
    operations are not.
    """

    parameters: int
    """All stored parameters, of every expert and router."""
    gflops: float
    """Per image. CPUs and exported files execute exactly these."""


@torch.no_grad()
def measure_cost(model: nn.Module, image_size: int) -> Cost:
    """Count the operations that one inference needs, including those of the routers.

    Args:
        model: A module from images [B, 3, H, W] in [0, 1] to logits; a routed one computes one
            expert per image, and since all experts of a layer have the same size, any image gives
            the same count.
        image_size: Height and width of the images.
    """
    parameter = next(model.parameters())
    if parameter.is_cuda:  # there both of two experts are computed, because that is faster
        model = copy.deepcopy(model).cpu()
        parameter = next(model.parameters())
    image = torch.full((1, 3, image_size, image_size), 0.5, device=parameter.device, dtype=parameter.dtype)
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(image)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=counter.get_total_flops() / 2e9,
    )


LATENCY_SECONDS = 2.0
"""Time for each batch size; at least `LATENCY_RUNS` and at most 100 runs are made."""
LATENCY_RUNS = 3


@torch.inference_mode()
def measure_latency(model: nn.Module, images: Tensor, batch_sizes: Sequence[int]) -> dict[int, float]:
    """Milliseconds per image of one inference, by batch size, on the model's device.

    The batch sizes take turns, so that the state of the machine affects all alike. The first run of
    each is not counted; the result is the median of the others.

    Args:
        model: A module from images to logits.
        images: [B, 3, H, W] in [0, 1], real ones: a routed model sends them to different experts.
            Used in turn.
        batch_sizes: Batch sizes, at most B.
    """
    images = images.to(next(model.parameters()).device)
    batches = {size: images[: len(images) // size * size].split(size) for size in sorted(set(batch_sizes))}
    seconds: dict[int, list[float]] = {size: [] for size in batches}

    def once(batch: Tensor) -> float:
        began = time.perf_counter()
        model(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        return time.perf_counter() - began

    def enough(taken: list[float]) -> bool:
        return len(taken) >= LATENCY_RUNS and (sum(taken) >= LATENCY_SECONDS or len(taken) >= 100)

    with evaluating(model):
        for parts in batches.values():
            once(parts[0])
        unfinished = list(batches)
        while unfinished:
            for size in unfinished:
                taken = seconds[size]
                taken.append(once(batches[size][len(taken) % len(batches[size])]))
            unfinished = [size for size, taken in seconds.items() if not enough(taken)]
    return {size: 1e3 * statistics.median(taken) / size for size, taken in seconds.items()}


def hardware(device: torch.device) -> str:
    """Description of the hardware on which times are measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
