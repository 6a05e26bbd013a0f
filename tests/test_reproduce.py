"""`advmoe reproduce`: which commands stand behind a table or figure, and what it shows of their results."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from advmoe.cli import reproduce
from advmoe.cli.app import app


class Commands:
    """Stands in for the commands that would take days: writes down the calls, answers with given results."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, command: str, *arguments: str, json: bool = True) -> dict[str, Any]:
        self.calls.append((command, *arguments))
        if command == "evaluate":
            return {"sa": 80.0, "ra_pgd50": 50.0, "gflops": 0.139}
        if command == "analyze":
            return {
                "conditions": {"pgd": {"dissection": {"router_survives_right": 45.5, "router_fooled_right": 4.5}}},
                "mask": {"clean": {"mean": 0.25}},
            }
        return {}

    def named(self, command: str) -> list[tuple[str, ...]]:
        return [call for call in self.calls if call[0] == command]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(reproduce, "run", commands)
    return commands


def table(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["reproduce", *arguments, *folders, "--json"])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "out" / f"{arguments[0]}.json").read_text())
    return printed


def test_pathways_of_fig6_are_compared_with_the_mask_of_the_sparse_cnn(tmp_path: Path, commands: Commands) -> None:
    runs = table(tmp_path, "fig6")["runs"]
    mask = str(tmp_path / "runs" / "table1-cifar10-resnet18-at-sparse" / "best.pt")
    analysed = commands.named("analyze")
    assert len(analysed) == 2
    assert all(call[-2:] == ("--mask", mask) for call in analysed)
    assert mask in commands.named("report")[0]
    # a Sparse-CNN has no routing of its own to analyse
    assert "routing" not in runs["table1-cifar10-resnet18-at-sparse"]
    assert runs["table1-cifar10-resnet18-advmoe"]["routing"]["mask"]["clean"]["mean"] == 0.25


def test_a_run_on_top_of_another_trains_that_one_first(tmp_path: Path, commands: Commands) -> None:
    table(tmp_path, "fig5")
    order = [call[call.index("--recipe") + 1] for call in commands.named("train")]
    assert order == ["fig3-standard-moe-r0.5", "fig3-router-at-r0.5", "fig5-expert-at"]
    last = commands.named("train")[-1]
    assert last[last.index("--init") + 1] == str(tmp_path / "runs" / "fig3-router-at-r0.5" / "best.pt")


def test_table1_needs_no_analysis_of_routing(tmp_path: Path, commands: Commands) -> None:
    runs = table(tmp_path, "table1", "--only", "cifar10-resnet18")["runs"]
    assert len(runs) == 5
    assert not commands.named("analyze")


def test_models_of_different_data_sets_get_reports_of_their_own(tmp_path: Path, commands: Commands) -> None:
    table(tmp_path, "table1", "--only", "resnet18")
    written = {
        Path(call[call.index("--out") + 1]).name: call[1 : call.index("--out")] for call in commands.named("report")
    }
    assert list(written) == [
        f"table1-{dataset}.html" for dataset in ("cifar10", "cifar100", "tinyimagenet", "imagenet")
    ]
    for name, folders in written.items():
        dataset = name.removeprefix("table1-").removesuffix(".html")
        assert len(folders) == 5
        assert all(f"table1-{dataset}-resnet18" in folder for folder in folders)


def test_the_table_shows_figures_from_anywhere_in_a_result() -> None:
    result = {"sa": 81.25, "routing": {"mask": {"clean": {"mean": 0.25}}}, "by_eps": {"2/255": 70.0, "4/255": 61.5}}
    assert reproduce.shown(result, "sa") == "81.25"
    assert reproduce.shown(result, "routing.mask.clean.mean") == "0.25"
    assert reproduce.shown(result, "by_eps") == "2/255: 70.00, 4/255: 61.50"
    # Dense has no routing, and nothing that was not measured is shown as a number
    assert reproduce.shown({"sa": 1.0}, "routing.mask.clean.mean") == "-"
