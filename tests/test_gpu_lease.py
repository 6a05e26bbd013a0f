"""The GPU benchmark: finished steps are not repeated, and the long trainings come last."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from claimed_gpu import claimed_gpu


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "gpu_lease.py"
    spec = importlib.util.spec_from_file_location("gpu_lease", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_lease", module)  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def names_of(lease: ModuleType, *, epochs: int) -> list[str]:
    return [name for process in lease.processes(Path(), smoke=False, epochs=epochs) for name, _ in process]


def test_a_step_that_is_done_is_not_done_again_and_one_that_fails_stops_no_other(
    lease: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def step(name: str) -> dict[str, Any]:
        ran.append(name)
        if name == "second" and ran.count(name) == 1:
            raise RuntimeError("out of memory")
        if name == "third" and ran.count(name) == 1:
            raise KeyboardInterrupt
        return {"of": name}

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu_lease.py", "--out", str(tmp_path), *options])
        lease.main()

    groups = (("first", "second"), ("third",), ("fourth",))
    made = [[(name, lambda n=name: step(n)) for name in group] for group in groups]
    monkeypatch.setattr(lease, "processes", lambda out, **_: made)
    with pytest.raises(KeyboardInterrupt):
        run("--json")
    capsys.readouterr()
    run("--list")
    assert capsys.readouterr().out.splitlines() == ["second", "third", "fourth"]
    run("--json", "--only", "fourth", "second")
    assert ran == ["first", "second", "third", "second", "fourth"]
    figures = json.loads(capsys.readouterr().out)
    assert figures["first"]["of"] == "first"
    with pytest.raises(SystemExit):
        run("--only", "fifth", "first")
    assert "there is no step fifth; the steps are first, second, third, fourth" in capsys.readouterr().err
    assert "third" not in figures
    assert {"hardware", "torch", "cuda"} <= set(json.loads((tmp_path / "second.json").read_text()))


def test_what_failed_is_named_at_the_end_and_leaves_no_file(
    lease: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "processes", lambda out, **_: [[("wrong", lambda: 1 / 0), ("right", dict)]])
    monkeypatch.setattr(sys, "argv", ["gpu_lease.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed, and not done: wrong"):
        lease.main()
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["right.json"]


def test_the_script_runs_a_process_for_each_line_and_fails_with_the_list(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *--list*) test -e {tmp_path}/broken && exit 1; echo tests; echo one two; echo three; exit 0;;
    *"--only tests"*) cat; echo "$@" >> {tmp_path}/ran; exit 1;;
esac
echo "$@" >> {tmp_path}/ran
"""
    )
    python.chmod(0o755)
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_lease.sh"

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": str(python)}
        command = ["sh", str(script), "results of a day", "3"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    done = run()
    assert done.returncode == 1
    assert "not done: some of tests" in done.stderr
    start = "benchmarks/gpu_lease.py --out results of a day --epochs 3 --only"
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == [f"{start} {names} --json" for names in ("tests", "one two", "three")]
    (tmp_path / "broken").touch()
    done = run()
    assert (done.returncode, done.stderr) == (1, "the steps cannot be listed\n")


def test_the_tests_of_a_gpu_are_in_the_files_that_the_lease_runs(lease: ModuleType) -> None:
    marked = [
        path.name for path in Path(__file__).parent.glob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()
    ]
    assert sorted(marked) == sorted(lease.GPU_TESTS)


def test_the_long_trainings_come_last_and_advmoe_first_among_them(lease: ModuleType) -> None:
    names = names_of(lease, epochs=100)
    assert names[0] == "tests"
    assert names[-4:] == ["train-moe-advmoe", "train-s_dense-at", "train-dense-at", "train-moe-at"]


def test_every_way_to_compute_a_step_is_timed_against_the_plain_one(lease: ModuleType) -> None:
    names = names_of(lease, epochs=0)
    assert len(names) == len(set(names))
    for name in (
        *("speed-moe-advmoe-128-fp32", "speed-moe-advmoe-128-bf16"),
        *("speed-moe-advmoe-128-bf16-kernels", "speed-moe-advmoe-128-bf16-graphs"),
        *("speed-moe-advmoe-128-bf16-tiles", "speed-moe8-advmoe-128-bf16", "speed-moe8-advmoe-128-bf16-tiles"),
        *("speed-moe-advmoe-128-bf16-channels-last", "speed-s_dense-at-128-bf16-channels-last"),
        *("waits-moe-advmoe-128-fp32", "routes-bf16", "exported", "autoattack"),
    ):
        assert name in names


def test_the_steps_leave_no_tensor_on_the_cpu(lease: ModuleType) -> None:
    with claimed_gpu():
        steps = dict(step for process in lease.processes(Path(), smoke=True, epochs=0) for step in process)
        del steps["exported"]  # the exporter takes a network to the CPU, and needs tensors of torch's own there
        found = {name: step() for name, step in steps.items()}
    assert found["autoattack"]["images_per_second"] > 0
