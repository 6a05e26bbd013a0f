"""Random numbers as pure functions of their place in a run, so that resuming needs no generator state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator_for(seed: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place of a run, such as (step, level).

    Different places give independent streams, but for chance: the generator of the CPU uses 32 bits
    of its seed, so two given places have the same stream with probability 2^-32.
    """
    # A spawn key is used because a plain list would be padded: [seed, 3] would equal [seed, 3, 0].
    state = np.random.SeedSequence(seed, spawn_key=position).generate_state(1, np.uint64)
    generator = torch.Generator(device=device)
    generator.manual_seed(int(state[0] >> np.uint64(1)))
    return generator


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the context, and restore their state afterwards.

    These are the CPU's and, if CUDA is in use already, that of the present GPU. Other GPUs are left
    alone: to restore each would cost a wait and a warning.
    """
    in_use = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=in_use):
        torch.default_generator.manual_seed(seed)
        if in_use:
            torch.cuda.manual_seed(seed)
        yield
