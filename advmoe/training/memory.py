"""Estimates the memory of a training step in advance, because a process that runs out of memory is killed silently.

Activations take nearly all of it. In TRADES those of both passes, clean and adversarial, live until
the backward pass. The difference between four images and two gives those of an image, without what
is kept once for all of them, such as masked or bf16 weights. So the estimate holds for every
backbone, engine and precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advmoe.config import TrainConfig
from advmoe.distributed import world
from advmoe.errors import ConfigError
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.world import processes_here

MEASURED = 2
"""Images of the first measurement. The second one has twice as many."""
HEADROOM = 1.3
"""Upper estimate relative to the minimum: buffers of convolutions, gradients of activations, fragmentation."""
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
"""Memory of a container that the kernel gives back when it is needed, by its names in memory.stat."""
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run."""

    needed: int
    """Minimum of a step: weights, their gradients and momentum, images, activations."""
    available: int | None
    """Free memory of the device; None if unknown."""

    def __str__(self) -> str:
        known = "" if self.available is None else f", {self.available / GB:.1f} GB are available"
        return f"a step takes about {self.needed / GB:.1f} GB of memory{known}"


def activations(model: RoutedNetwork, image_size: int, *, half: bool = False) -> int:
    """Bytes that a training step keeps from one image's forward pass until its backward pass.

    Args:
        model: Its mode and its gradients do not change.
        image_size: Height and width in pixels.
        half: Whether the pass computes in bf16.
    """
    few, many = (_kept(model, number, image_size, half) for number in (MEASURED, 2 * MEASURED))
    return (many - few) // MEASURED


def _kept(model: RoutedNetwork, number: int, image_size: int, half: bool) -> int:
    """Bytes that the forward pass of some images keeps, with the weights and what is derived from them."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # keeps tensors alive, so that no storage is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    device = model.mean.device
    images = torch.zeros(number, 3, image_size, image_size, device=device)
    with (
        evaluating(model),
        torch.enable_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(images.requires_grad_())
    return sum(kept.values())


def estimate(model: RoutedNetwork, config: TrainConfig, image_size: int) -> Memory:
    """The memory of one rank in one step of a run, and the free memory of its device."""
    device = model.mean.device
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    copies = 2 + bool(config.momentum) + bool(config.ema) + bool(config.awp)
    passes = 1 if config.method == "standard" or config.loss != "trades" else 2
    image = 2 * passes * 3 * 4 * image_size**2
    # bf16_attack computes only the attack in bf16, the passes to descend in fp32
    kept = passes * activations(model, image_size, half=config.precision == "bf16")
    here = weights  # the weights are already allocated
    own = math.ceil(config.batch_size / world().size)
    needed = copies * weights + math.ceil(own / config.accumulate) * kept + own * image
    left = available(device)
    return Memory(needed, None if left is None else left + here)


def validation_batch(batch_size: int, image_size: int) -> int:
    """Batch size of the attack in validation, at most 256: a training batch, or as many images as
    have the pixels of 256 images of 32 x 32.
    """
    return min(256, max(batch_size, 256 * 32**2 // image_size**2))


def available(device: torch.device) -> int | None:
    """Free bytes of a device, or of this process's share of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_free_of_machine(Path("/proc/meminfo")), _free_of_group(Path("/sys/fs/cgroup"))]
    known = [limit for limit in limits if limit is not None]
    return min(known) // processes_here() if known else None


def _free_of_machine(path: Path) -> int | None:
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _free_of_group(path: Path) -> int | None:
    """Memory that the container may still use. Files that were read count as used until the memory is needed."""
    try:
        free = int((path / "memory.max").read_text()) - int((path / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit
        return None
    try:
        lines = (line.split() for line in (path / "memory.stat").read_text().splitlines())
        return free + sum(int(bytes_) for name, bytes_ in lines if name in RECLAIMABLE)
    except (OSError, ValueError):
        return free


def check_memory(model: RoutedNetwork, config: TrainConfig, image_size: int) -> tuple[Memory, str | None]:
    """The memory of a run, and a warning if it may not fit.

    Raises:
        ConfigError: The minimum exceeds the free memory.
    """
    memory = estimate(model, config, image_size)
    if memory.available is None or HEADROOM * memory.needed <= memory.available:
        return memory, None
    smaller = (
        f"{memory} with batches of {config.batch_size} images of {image_size} pixels; "
        "use smaller ones, or compute each batch in parts"
    )
    if memory.needed > memory.available:
        raise ConfigError(smaller, "batch_size", "accumulate", "image_size", "width")
    return memory, f"{smaller} if the run is killed"
