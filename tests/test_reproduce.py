"""`advmoe reproduce`: the commands behind a table or figure, and the shown results."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from advmoe.cli import reproduce
from advmoe.cli.app import app, main
from advmoe.cli.called import CALLS
from advmoe.experiments import EXPERIMENTS, SCALES, independent, selected


class Commands:
    """Stands in for the commands that would take days: writes down the calls, answers with given results."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, command: str, *arguments: str, json: bool = True, group: str | None = None) -> dict[str, Any]:
        self.calls.append((command, *arguments))
        if command in {"train", "evaluate"}:
            Path(arguments[arguments.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
        if command == "train":
            Path(arguments[arguments.index("--out") + 1], "best.pt").write_text(shlex.join(arguments))
        if command == "evaluate":
            seed = int(arguments[arguments.index("--seed") + 1])
            digest = hashlib.sha256(Path(arguments[0]).read_bytes()).hexdigest()
            figures = {"sa": 80.0 + 2 * seed, "ra": 50.0, "gflops": 0.139, "ra_by_eps": {"2/255": 70.0}}
            return figures | {"checkpoint_sha256": digest}
        if command == "analyze":
            return {
                "conditions": {"pgd": {"dissection": {"router_survives_right": 45.5, "router_fooled_right": 4.5}}},
                "mask": {"clean": {"mean": 0.25}},
            }
        return {}

    def named(self, command: str) -> list[tuple[str, ...]]:
        return [call for call in self.calls if call[0] == command]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    commands = Commands()
    monkeypatch.setattr(reproduce, "run", commands)
    monkeypatch.chdir(tmp_path)
    return commands


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["reproduce", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.stdout


def table(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(*arguments, "--json"))
    assert found == json.loads(Path("results", f"{arguments[0]}.json").read_text())
    return found


def test_pathways_of_fig6_are_compared_with_the_mask_of_the_sparse_cnn(commands: Commands) -> None:
    runs = table("fig6")["runs"]
    (sparse,) = [name for name in runs if "sparse" in name]
    mask = f"runs/{sparse}/best.pt"
    analyzed = commands.named("analyze")
    assert len(analyzed) == 2
    assert all(call[-2:] == ("--mask", mask) for call in analyzed)
    assert mask in commands.named("report")[0]
    # A Sparse-CNN has no routing of its own to analyze.
    assert "routing" not in runs[sparse][0]
    assert all(runs[name][0]["routing"]["mask"]["clean"]["mean"] == 0.25 for name in runs if name != sparse)


def test_pathways_of_each_seed_are_compared_with_the_mask_of_that_seed(commands: Commands) -> None:
    runs = table("fig6", "--seeds", "0,1")["runs"]
    (sparse,) = [name for name in runs if "sparse" in name]
    analyzed = commands.named("analyze")
    assert len(analyzed) == 4
    for _, folder, _, mask in analyzed:
        ending = "-seed1" if "-seed1/" in folder else ""
        assert mask == f"runs/{sparse}{ending}/best.pt"
    (report,) = commands.named("report")  # of the first seed
    assert f"runs/{sparse}/best.pt" in report


def test_mask_and_pathways_of_fig6_start_from_one_checkpoint(commands: Commands) -> None:
    table("fig6")
    trained = commands.named("train")
    starts = {call[call.index("--init") + 1] for call in trained if "--init" in call}
    assert starts == {"runs/table1-cifar10-resnet18-at-dense/best.pt"}
    assert len([call for call in trained if "--init" in call]) == 3


def test_a_run_on_top_of_another_trains_that_one_first_and_shows_it_beside(commands: Commands) -> None:
    runs = table("fig5")["runs"]
    order = [call[call.index("--recipe") + 1] for call in commands.named("train")]
    assert order == ["fig3-standard-moe-r0.5", "fig3-router-at-r0.5", "fig5-expert-at"]
    last = commands.named("train")[-1]
    assert last[last.index("--init") + 1] == "runs/fig3-router-at-r0.5/best.pt"
    assert list(runs) == ["fig3-router-at-r0.5", "fig5-expert-at"]  # Figs. 4 and 5 side by side


def test_finished_work_is_not_repeated_unless_the_options_change(commands: Commands) -> None:
    table("table1", "--only", "cifar10-resnet18")
    assert (len(commands.named("train")), len(commands.named("evaluate"))) == (5, 5)
    assert not commands.named("analyze")
    commands.calls.clear()
    table("table1", "--only", "cifar10-resnet18")
    assert [call[0] for call in commands.calls] == ["report"]
    commands.calls.clear()
    table("table1", "--only", "cifar10-resnet18", "--evaluate", "--steps 20")
    assert (len(commands.named("train")), len(commands.named("evaluate"))) == (0, 5)
    commands.calls.clear()
    Path("runs/table1-cifar10-resnet18-advmoe/best.pt").write_text("of a new training")
    table("table1", "--only", "cifar10-resnet18", "--evaluate", "--steps 20")
    (again,) = commands.named("evaluate")
    assert again[1] == "runs/table1-cifar10-resnet18-advmoe/best.pt"


def test_a_table_gives_routed_models_the_attacks_on_their_routing(commands: Commands) -> None:
    table("table2", "--only", "cifar10-resnet18")
    evaluated = commands.named("evaluate")
    assert evaluated
    assert all({"--routing", "--autoattack"} <= set(call) for call in evaluated)


def test_models_of_different_data_sets_get_reports_of_their_own(commands: Commands) -> None:
    table("table1", "--only", "resnet18")
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


def test_seeds_have_runs_of_their_own_and_give_mean_and_deviation(commands: Commands) -> None:
    shown = printed("table1", "--only", "table1-cifar10-resnet18-advmoe", "--seeds", "0,1,2")
    # SA of 80, 82 and 84: the mean is 82, the deviation sqrt((4 + 0 + 4) / 2) = 2.
    assert "82.0±2.0" in shown
    assert "50.0±0.0" in shown
    assert "3 seeds, mean ± standard deviation" in shown
    folders = [call[call.index("--out") + 1] for call in commands.named("train")]
    assert folders == [f"runs/table1-cifar10-resnet18-advmoe{ending}" for ending in ("", "-seed1", "-seed2")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_table_fits_80_columns_and_says_what_was_made_smaller(name: str, commands: Commands) -> None:
    shown = printed(name, "--scale", "smoke", "--seeds", "0,1")
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("2 seeds"))
    assert "Smaller than in the paper: digits instead of the data set" in shown
    trained = commands.named("train")
    assert trained
    assert all("digits" in call for call in trained)


def test_independent_commands_together_do_all_the_work(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    table("fig3", "--scale", "small")
    whole = {call for call in commands.calls if call[0] in {"train", "evaluate"}}
    lines = printed("fig3", "--scale", "small", "--list", "--runs", "again").splitlines()
    # Router-only AT goes on from standard MoEs, masks from one standard Dense: 3 + 1 groups, and
    # S-Dense at 3 scales.
    assert len(lines) == 7
    commands.calls.clear()
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "advmoe"
        before = len(commands.calls)
        assert main(arguments) == 0
        ran = commands.calls[before:]
        assert len({call[call.index("--out") + 1] for call in ran}) == len(ran)
    parts = {tuple(part.replace("again", "runs-small") for part in call) for call in commands.calls}
    assert parts == whole


def test_every_scale_of_every_experiment_has_runs() -> None:
    for name in EXPERIMENTS:
        for scale in SCALES:
            chosen = selected(name, scale, [])
            assert chosen
            assert sorted(r.name for group in independent(chosen) for r in group) == sorted(r.name for r in chosen)


def test_commands_side_by_side_share_out_the_gpus_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import os, sys, pathlib; pathlib.Path(sys.argv[-1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    program = tmp_path / "python"
    program.write_text(f"#!{reproduce.sys.executable}\n{code}\nsys.exit('fail' in sys.argv[-1])\n")
    program.chmod(0o755)
    monkeypatch.setattr(reproduce.sys, "executable", str(program))
    commands = [[str(tmp_path / name)] for name in ("a", "b", "c")]
    reproduce.side_by_side(commands, ["0", "1"])
    assert {(tmp_path / name).read_text() for name in ("a", "b", "c")} == {"0", "1"}
    with pytest.raises(reproduce.AdvMoEError, match="1 of 2 commands failed"):
        reproduce.side_by_side([[str(tmp_path / "fail")], [str(tmp_path / "fine")]], ["0", "1"])
    assert (tmp_path / "fine").is_file()


def test_a_command_that_was_stopped_by_itself_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    # 143, the status after SIGTERM, of a command that was told to leave the last line to its caller
    program.write_text(
        f"#!{reproduce.sys.executable}\nimport os, sys\nsys.exit(143 if 'ADVMOE_CALLED' in os.environ else 0)"
    )
    program.chmod(0o755)
    monkeypatch.setattr(reproduce.sys, "executable", str(program))
    with pytest.raises(reproduce.AdvMoEError, match="1 of 1 commands failed"):
        reproduce.side_by_side([["reproduce", "fig3"]], [None])
    assert "terminated: advmoe reproduce fig3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "unknown table or figure 'table9'"),
        (["table1", "--only", "mnist"], "no run of table1 has a name like 'mnist'"),
        (["table1", "--scale", "tiny"], "unknown scale 'tiny'"),
        (["table1", "--scale", "smal"], "did you mean 'small'? (--scale)"),
        (["table1", "--only", "table1-cifar10-vgg16-advmoo"], "did you mean 'table1-cifar10-vgg16-advmoe'?"),
        ([], "expected a table or figure, one of: table1, table2,"),
        (["table1", "--seeds", "0,x"], "--seeds must be a list of whole numbers"),
        (["table1", "--seeds", "0,0"], "--seeds has a seed twice: 0,0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_list_without_a_name_is_of_the_tables_and_figures() -> None:
    lines = printed("--list").splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert lines[0] == "table1  Table 1, 80 runs"  # 4 data sets, 4 backbones, 5 methods
    assert printed("--list", "--scale", "small").splitlines()[0] == "table1  Table 1, 5 runs"


def test_torchruns_processes_do_each_training_together_and_reports_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def child(process: Any, environment: dict[str, str]) -> tuple[int, str]:
        seen.append(environment)
        return 0, '{"ra": 1.0}' if "--json" in process else ""

    monkeypatch.setattr(reproduce, "run_to_its_end", child)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reproduce.run("train", "digits", group="train runs/a") == {"ra": 1.0}
    assert reproduce.run("evaluate", "runs/a", group="evaluate runs/a") == {"ra": 1.0}
    assert reproduce.run("report", "runs/a", json=False) == {}
    # A meeting place of its own for each command, and for those that reproduce itself has.
    assert len({environment.get("ADVMOE_GROUP", "") for environment in seen[:2]} | {""}) == 3
    assert [environment["WORLD_SIZE"] for environment in seen] == ["2", "2", "1"]
    assert all(CALLS.items() <= environment.items() for environment in seen)
    assert main(["reproduce", "table1", "--jobs", "2"]) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(reproduce, "run_to_its_end", lambda *_: (0, ""))
    assert reproduce.run("train", "digits", group="train runs/a") == {}, "the leader's result is shown to all"


def test_the_table_shows_figures_from_anywhere_in_a_result() -> None:
    result = {"sa": 81.25, "gflops": 0.13912, "routing": {"mask": {"clean": {"mean": 0.25}}}}
    assert reproduce.cell([result], "sa") == "81.25"
    assert reproduce.cell([result], "gflops") == "0.1391"
    assert reproduce.cell([result], "routing.mask.clean.mean") == "0.250"
    # Dense has no routing, and nothing that was not measured is shown as a number.
    assert reproduce.cell([{"sa": 1.0}], "routing.mask.clean.mean") == "-"


@pytest.mark.slow
def test_fig2_at_the_smallest_scale_is_trained_evaluated_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "fig2", "--scale", "smoke", "--only", "at-s-dense", "--json"]) == 0
    (result,) = json.loads(capfd.readouterr().out)["runs"]["table1-cifar10-resnet18-at-s-dense"]
    assert set(result["ra_by_eps"]) == {f"{level}/255" for level in (2, 4, 6, 8, 10, 12)}
    assert (tmp_path / "results" / "fig2.html").is_file()


def test_a_run_on_top_of_another_starts_from_that_of_its_seed(commands: Commands) -> None:
    table("fig5", "--seeds", "0,1")
    trained = [call for call in commands.named("train") if "--init" in call]
    for call in trained:
        ending = "-seed1" if call[call.index("--seed") + 1] == "1" else ""
        assert call[call.index("--init") + 1].endswith(f"0.5{ending}/best.pt")
    assert len(trained) == 4


def test_a_run_that_was_begun_goes_on(commands: Commands) -> None:
    name = "table1-cifar10-resnet18-advmoe"
    last = Path("runs", name, "last.pt")
    last.parent.mkdir(parents=True)
    last.touch()
    table("table1", "--only", f"{name},table1-cifar10-resnet18-at-dense")
    resumed = {call[call.index("--recipe") + 1]: "--resume" in call for call in commands.named("train")}
    assert resumed == {name: True, "table1-cifar10-resnet18-at-dense": False}
