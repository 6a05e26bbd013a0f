"""`advmoe train` for torchrun. Rank 1 kills itself once, after its third step of the first start."""

import os
import signal
import sys

from advmoe.cli.app import main
from advmoe.data.loader import Batch
from advmoe.training import loop

STEPS = 3
run_step = loop.Trainer._run_step


def killing(trainer: loop.Trainer, batches: list[Batch]) -> None:
    run_step(trainer, batches)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.step == STEPS:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    loop.Trainer._run_step = killing  # type: ignore[method-assign]
    sys.exit(main())
