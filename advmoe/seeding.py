"""Random numbers as pure functions of where in a run they are drawn: resuming needs no generator state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator_for(seed: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place of a run, such as (step, level); different places give independent streams."""
    # A spawn key, since a plain list of numbers runs them together: [seed, 3] would equal [seed, 3, 0].
    state = np.random.SeedSequence(seed, spawn_key=position).generate_state(1, np.uint64)
    generator = torch.Generator(device=device)
    generator.manual_seed(int(state[0] >> np.uint64(1)))
    return generator


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global generators as seeded here; their former state is restored.

    Of several GPUs only the present one is concerned. The state of all of them costs a wait each, and a warning.
    """
    in_use = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=in_use):
        torch.manual_seed(seed)
        yield
