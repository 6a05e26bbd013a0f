"""Kill a run at random points and resume it each time: `killed_runs.py FOLDER KILLS`.

The program imports all modules once. Each attempt is a fork, which kills itself by SIGKILL after a
random number of function calls and returns of the interpreter: in a step, or during a write. The
program prints as JSON what it interrupted.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)

from runs import TRAIN, resumed, train  # noqa: E402

from advmoe.data.digits import load_digits  # noqa: E402
from advmoe.data.sources import Dataset  # noqa: E402

ANYWHERE, WRITING = 300_000, 60_000
"""Events until the kill, at most: a whole run has some 900,000, and 40,000 while it writes a checkpoint."""


def kill_after(events: int, *, writing: bool) -> None:
    """Have this process killed after so many events, of all or of those while a file is written."""
    left, depth = events, 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left, depth
        if frame.f_code.co_name in {"write_atomically", "log"} and event in {"call", "return"}:
            depth += 1 if event == "call" else -1
        left -= depth > 0 or not writing
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def attempt(dataset: Dataset, path: Path, events: int | None, *, writing: bool) -> bool:
    """Train, or go on, in a process of its own; whether it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if events is not None:
                kill_after(events, writing=writing)
            status = 0 if (resumed if (path / "last.pt").exists() else train)(dataset, path, TRAIN, minutes=0) else 1
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "an attempt failed, see above"
    return False


def main(folder: Path, kills: int) -> None:
    whole = load_digits()
    dataset = Dataset(info=whole.info, train=whole.train.take(np.arange(200)), test=whole.test.take(np.arange(40)))
    generator = random.Random(0)
    hit = {"kills": 0, "half-written files": 0}
    number = 0
    while hit["kills"] < kills:
        number += 1
        path = folder / str(number)
        writing = generator.random() < 0.5
        while attempt(dataset, path, generator.randrange(WRITING if writing else ANYWHERE), writing=writing):
            hit["kills"] += 1
            hit["half-written files"] += len(list(path.glob(".*.pt.*"))) if path.exists() else 0
            writing = generator.random() < 0.5
            if hit["kills"] >= kills:
                attempt(dataset, path, None, writing=False)
                break
    print(json.dumps(hit | {"runs": number}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
