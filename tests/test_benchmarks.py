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
