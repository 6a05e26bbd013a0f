"""The processes that `torchrun` started, and the rank of this one, known before torch is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

from advmoe.errors import ConfigError

GROUP = "ADVMOE_GROUP"
"""Environment variable that keeps the meetings of several commands apart that one torchrun starts one after another."""


@dataclass(frozen=True)
class World:
    """The rank of this process, and the number of ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this rank on its own machine."""

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's part of `total` items. The parts are as equal as possible."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)


def launched() -> World:
    """The world that torchrun describes in the environment; one rank if there is no description.

    Raises:
        ConfigError: The description is incomplete.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if size == "1":
        return World()
    try:
        described = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        _ = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the environment says WORLD_SIZE={size}, but not all else that torchrun says ({error}); "
            "start the command with torchrun, or unset WORLD_SIZE"
        ) from None
    return described


def processes_here() -> int:
    """Number of processes that torchrun started on this machine. They share its memory and its processors."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def ranks_here() -> int:
    """Number of processes on this machine that work together, this one among them.

    They are those of torchrun, or 1 for a command that one of them has started for itself alone.
    """
    return min(int(os.environ.get("WORLD_SIZE") or 1), processes_here())


def restarts() -> int:
    """Number of times that torchrun has restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
