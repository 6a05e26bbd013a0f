"""Every script in benchmarks/ runs in its smallest form and prints one JSON object."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


SLOW = {"attack", "export", "serving"}


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else ()) for path in SCRIPTS],
    ids=[path.stem for path in SCRIPTS],
)
def test_a_benchmark_prints_its_figures(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--smoke", "--json"])
    runpy.run_path(str(script), run_name="__main__")
    figures = json.loads(capsys.readouterr().out)
    assert isinstance(figures, dict)
    assert len(figures) >= 2


def test_the_router_probe_looks_at_a_checkpoint_without_changing_it(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole_run / "last.pt"
    before = path.read_bytes()
    script = SCRIPTS[0].parent / "router_probe.py"
    options = ["--checkpoints", str(path), "--images", "8", "--forms", "dense", "--json"]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    (figures,) = found["probes"]
    assert found["num_experts"] == 2
    assert 0 < figures["better"] < 1
    assert figures["regret"] > 0
    assert 0.5 <= figures["load"] <= 1
    assert path.read_bytes() == before
