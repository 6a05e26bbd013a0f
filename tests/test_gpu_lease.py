"""The GPU benchmark: finished steps are not repeated, and the long trainings come last."""

import importlib.util
import json
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


def test_a_step_that_is_done_is_not_done_again(
    lease: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def step(name: str) -> dict[str, Any]:
        ran.append(name)
        if name == "second" and ran.count(name) == 1:
            raise KeyboardInterrupt
        return {"of": name}

    monkeypatch.setattr(
        lease, "steps", lambda out, **_: [(name, lambda n=name: step(n)) for name in ("first", "second", "third")]
    )
    monkeypatch.setattr(sys, "argv", ["gpu_lease.py", "--out", str(tmp_path), "--json"])
    with pytest.raises(KeyboardInterrupt):
        lease.main()
    monkeypatch.setattr(sys, "argv", ["gpu_lease.py", "--out", str(tmp_path), "--list"])
    lease.main()
    assert capsys.readouterr().out.split() == ["second", "third"]
    monkeypatch.setattr(sys, "argv", ["gpu_lease.py", "--out", str(tmp_path), "--json"])
    lease.main()
    assert ran == ["first", "second", "second", "third"]
    figures = json.loads(capsys.readouterr().out)
    assert figures["first"]["of"] == "first"
    assert {"hardware", "torch", "cuda"} <= set(json.loads((tmp_path / "second.json").read_text()))


def test_the_long_trainings_come_last_and_advmoe_first_among_them(lease: ModuleType) -> None:
    names = [name for name, _ in lease.steps(Path(), smoke=False, epochs=100)]
    assert names[0] == "tests"
    assert names[-4:] == ["train-moe-advmoe", "train-s_dense-at", "train-dense-at", "train-moe-at"]


def test_every_way_to_compute_a_step_is_timed_against_the_plain_one(lease: ModuleType) -> None:
    names = [name for name, _ in lease.steps(Path(), smoke=False, epochs=0)]
    assert len(names) == len(set(names))
    for name in (
        *("speed-moe-advmoe-128-fp32", "speed-moe-advmoe-128-bf16"),
        *("speed-moe-advmoe-128-bf16-kernels", "speed-moe-advmoe-128-bf16-graphs"),
        *("speed-moe-advmoe-128-bf16-tiles", "speed-moe8-advmoe-128-bf16", "speed-moe8-advmoe-128-bf16-tiles"),
        *("waits-moe-advmoe-128-fp32", "routes-bf16", "exported", "autoattack"),
    ):
        assert name in names


def test_the_steps_leave_no_tensor_on_the_cpu(lease: ModuleType) -> None:
    with claimed_gpu():
        steps = dict(lease.steps(Path(), smoke=True, epochs=0))
        del steps["exported"]  # the exporter takes a network to the CPU, and needs tensors of torch's own there
        found = {name: step() for name, step in steps.items()}
    assert found["autoattack"]["images_per_second"] > 0
