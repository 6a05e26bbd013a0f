"""A run that is killed at any point and resumed gives the same result as an uninterrupted run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_identical, contents

KILLS = 21


@pytest.mark.slow
def test_a_run_killed_at_twenty_one_random_points_ends_bit_for_bit_as_one_that_was_not(
    whole_run: Path, tmp_path: Path
) -> None:
    program = Path(__file__).with_name("killed_runs.py")
    paths = [str(program.parent), *sys.path]
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), str(KILLS)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    hit = json.loads(done.stdout)
    assert hit["kills"] == KILLS
    assert hit["half-written files"] >= 3, "some kills came in the middle of a write"
    runs = list(tmp_path.iterdir())
    assert len(runs) == hit["runs"] >= 1
    for run in runs:
        assert_identical(contents(run), contents(whole_run))
        assert not list(run.glob(".*")), "leftovers of killed writes, and locks, are gone"
