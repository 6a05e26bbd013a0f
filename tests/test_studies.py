"""The study of small networks: one file per cell, finished cells are skipped, and tables come from the files."""

import base64
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rooms import TwoRooms

from advmoe.data.sets import ImageSet
from advmoe.evaluation.controls import controlled

STUDIES = Path(__file__).parent.parent / "studies"


def run(script: str, *options: object) -> None:
    sys.argv = [script, *map(str, options)]
    runpy.run_path(str(STUDIES / script), run_name="__main__")


def test_a_cell_is_one_file_and_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    wanted = ("--smoke", "--only", "shared", "--seeds", 0, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    run("small.py", *wanted)
    (cell,) = (tmp_path / "out" / "resnet18").iterdir()
    record = json.loads(cell.read_text())
    assert (record["setting"], record["seed"], record["test"]["images"]) == ("shared", 0, 40)
    assert record["test"]["routing"]["ra_worst"] <= record["test"]["ra_pgd"]
    # its routers scale the outputs, so experts cannot be averaged without another scale
    controls = record["test"]["controls"]
    assert {name: len(draws) for name, draws in controls.items()} == {"unchanged": 1, "random": 5, "inverted": 1}
    assert all(set(draw["correct"]) == {"clean", "pgd"} for draw in controls["random"])
    assert len({draw["same_decisions"] for draw in controls["random"]}) > 1
    routing = record["test"]["routing"]
    assert routing["decisions_flipped_by_aim"] > routing["decisions_flipped"]
    assert record["test"]["starts"]["ra"] <= record["test"]["ra_pgd"]
    before = cell.read_bytes()
    capsys.readouterr()
    run("small.py", *wanted)
    assert "shared, seed 0: done" in capsys.readouterr().err
    assert cell.read_bytes() == before


def test_tables_come_from_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    # Two of four images right for one network, another two and one more for the other: 25 points,
    # and the four differences 1, 1, -1, 0 have a standard deviation of sqrt(11 / 16), so that the
    # error is half of that.
    (tmp_path / "vgg16").mkdir()
    for name, bits in (("s_dense", "oA=="), ("dense", "0A==")):  # 1010 and 1101, packed
        correct = {"clean": bits, "pgd": bits}
        test = {"images": 4, "sa": 50.0, "ra_pgd": 50.0, "correct": correct}
        record = {"setting": name, "seed": 0, "test": test, "gflops": 0.001, "parameters": 10, "train": {"epochs": 1}}
        record |= {"data": "noise", "model": {"arch": "vgg16", "width": 1.0}}
        record["curve"] = [{"epoch": 1, "train_loss": 2.0}]
        record["train_cpu_seconds"] = 90 if name == "dense" else None
        (tmp_path / "vgg16" / f"{name}-0.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text("Text.\n<!-- vgg16: begin -->\nold\n<!-- vgg16: end -->\nMore text.\n")
    run("tables.py", "--results", tmp_path, "--page", page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("Text.\n")
    assert text.endswith("More text.\n")
    assert "+25.0 ± 41.5" in text
    assert "| AT (S-Dense) | 0 | 1; - |" in text
    assert "| AT (Dense) | 0 | 1; 2 |" in text
    assert (tmp_path / "study-vgg16.svg").read_text().count("<svg") == 1
    accuracy = (tmp_path / "study-vgg16-accuracy.svg").read_text()
    assert [name in accuracy for name in ("AT (S-Dense)", "AT (Dense)", "AT (MoE)")] == [True, True, False]


def test_the_spread_of_a_difference_over_seeds_is_shown_beside_that_over_images() -> None:
    against = runpy.run_path(str(STUDIES / "tables.py"))["against"]

    def cell(seed: int, packed: str) -> dict[str, object]:
        return {"seed": seed, "test": {"images": 4, "correct": {"pgd": packed}}}

    # 1101 against 1010 is 25 points more, and the other way round 25 less. The images' differences
    # 0, 1, -1, 1 times 1, -1 and 1 have means of 0, 1/3, -1/3, 1/3 over seeds, with the mean 1/12.
    # The seeds' 25, -25 and 25 have a standard deviation of sqrt(833).
    ours, theirs = (
        [cell(seed, packed) for seed, packed in enumerate(packed)]
        for packed in (("0A==", "oA==", "0A=="), ("oA==", "0A==", "oA=="))
    )
    assert against(ours, theirs, "pgd") == "+8.3 ± 13.8; ± 16.7"
    assert against(ours[:2], theirs[:2], "pgd") == "+0.0 ± 0.0", "two seeds tell no spread"
    assert against([cell(3, "0A==")], [cell(0, "oA==")], "pgd") == "-", "no seed in common"


def test_a_control_has_the_error_of_its_difference_from_the_unchanged_one() -> None:
    control = runpy.run_path(str(STUDIES / "tables.py"))["control"]

    def cell(**controls: list[dict[str, object]]) -> dict[str, object]:
        return {"test": {"routing": {"images": 4}, "controls": controls}}

    def draw(sa: float, ra: float, clean: str = "0A==") -> dict[str, object]:
        return {"sa": sa, "ra_pgd": ra, "correct": {"clean": clean, "pgd": "0A=="}}

    # 1010 against 1101: the differences 0, -1, 1, -1 have the standard deviation sqrt(11 / 16), and
    # the error is half of that.
    measured = cell(unchanged=[draw(75, 75)], inverted=[draw(50, 25, "oA==")], random=[draw(50, 20), draw(70, 25)])
    assert control(measured, "inverted") == "50.0 ± 41.5 / 25.0 ± 0.0"
    assert control(measured, "unchanged") == "75.0 / 75.0"
    assert control(measured, "random") == "60.0 (50.0 to 70.0) / 22.5 (20.0 to 25.0)"
    assert control(measured, "averaged") == "-"


def test_equal_time_means_more_epochs_of_faster_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    epochs_of = runpy.run_path(str(STUDIES / "small.py"))["epochs_of"]
    assert epochs_of("s_dense", "resnet18") == epochs_of("advmoe_dense", "resnet18") == 6
    assert epochs_of("s_dense_time", "resnet18") == 16  # 6 * 2.64 = 15.8
    assert epochs_of("at_moe_time", "vgg16") == 5  # 3 * 1.66 = 5.0
    assert epochs_of("dense_long", "resnet18") == epochs_of("at_moe_long", "resnet18") == 16


def cells(packed: str, epochs: int) -> list[dict[str, object]]:
    """One cell of four images, whose clean and attacked versions are right as packed."""
    test = {"images": 4, "sa": 50.0, "ra_pgd": 50.0, "correct": {"clean": packed, "pgd": packed}}
    curve = [{"epoch": epoch + 1, "train_loss": 2.0} for epoch in range(epochs)]
    return [{"seed": 0, "test": test, "gflops": 0.001, "parameters": 10, "curve": curve}]


def test_settings_of_equal_time_are_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    tables = runpy.run_path(str(STUDIES / "tables.py"))["tables"]
    # 0000, 1000, 1010 and 1110
    timed = {name: cells(packed, 2) for name, packed in (("at_moe_time", "oA=="), ("s_dense_time", "4A=="))}
    timed |= {"advmoe_dense": cells("AA==", 1), "advmoe_cheap_time": cells("gA==", 3)}
    first, second = tables({"s_dense": cells("AA==", 1), **timed}).split("\n\n")
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == ["| AT (S-Dense)", "| AdvMoE, gate dense"]
    rows = [line.split(" | ") for line in second.splitlines()[2:]]
    differences = [[cell.split(" ±")[0].removesuffix(" |") for cell in row[5:]] for row in rows]
    assert differences == [
        ["-", "-", "-50.0", "-75.0"],
        ["+25.0", "+25.0", "-25.0", "-50.0"],
        ["+50.0", "+50.0", "-", "-25.0"],
        ["+75.0", "+75.0", "+25.0", "-"],
    ]
    assert "AdvMoE's training time" not in tables({"s_dense": cells("AA==", 1), "advmoe_dense": cells("AA==", 1)})


def test_long_trainings_are_compared_with_s_dense_after_as_many_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    tables = runpy.run_path(str(STUDIES / "tables.py"))["tables"]

    # 0000, 1000 and 1010: the long network is 50 points above the short S-Dense, 25 above the long one
    short, long = {"s_dense": cells("AA==", 1)}, {"s_dense_time": cells("gA==", 3), "at_moe_long": cells("oA==", 3)}
    first, _, last = tables({**short, **long}).split("\n\n")
    assert "16 epochs" not in first
    assert "AdvMoE's time | 0 | 3; - |" not in first
    assert last.count("AT (S-Dense), AdvMoE's time") == 1
    row = next(line for line in last.splitlines() if "16 epochs" in line)
    assert row.count("+25.0 ± 21.7") == 2  # the square root of 3 / 16, over that of 4 images
    assert "\n\n" not in tables(short)


OF_DENSE = ("mask_of_dense", "at_moe_of_dense", "advmoe_of_dense")


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a Dense, of an MoE-CNN with a start of its own, and of three networks that start from the Dense."""
    folder = tmp_path_factory.mktemp("study")
    train = ("--smoke", "--seeds", 0, "--runs", folder / "runs", "--out", folder / "out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.syspath_prepend(str(STUDIES))
        with pytest.raises(SystemExit, match=r"mask_of_dense starts from .*dense-0/last.pt, which is not there"):
            run("small.py", *train, "--only", *OF_DENSE)
        run("small.py", *train, "--only", "dense", "at_moe", *OF_DENSE)
    return folder / "runs"


def draw(runs: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Draw the figures of runs. Returns the folder of what was measured for them."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.syspath_prepend(str(STUDIES))
    wanted = ("--dataset", "digits", "--images", 20, "--steps", 2, "--results", to / "results", "--docs", to)
    run("figures.py", "--runs", runs, *wanted)
    return to / "results" / "resnet18" / "routing"


def test_figures_show_finished_runs_and_name_those_that_are_not_there(
    small_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dense-0", "at_moe-0"):
        shutil.copytree(small_runs / "resnet18" / name, tmp_path / "runs" / "resnet18" / name)
    (path,) = draw(tmp_path / "runs", tmp_path, monkeypatch).iterdir()
    assert "advmoe_dense, seed 0: not there, left out" in capsys.readouterr().err
    found = json.loads(path.read_text())
    assert (found["setting"], found["images"]) == ("at_moe", 20)
    parts = found["conditions"]["pgd"]["dissection"]
    assert sum(value for key, value in parts.items() if key.startswith("router_") and key != "router_robustness") == 100
    # at N = 2 and r = .5 a pathway and a mask have half of the channels each
    assert found["mask_from"] == "largest channels of AT (Dense)"
    assert 0.2 < found["mask"]["clean"]["mean"] < 0.5
    assert {each.name for each in tmp_path.glob("*.svg")} == {"study-resnet18-fig4-5.svg", "study-resnet18-fig6.svg"}


def test_fig6_compares_networks_that_start_from_one_dense(
    small_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = draw(small_runs, tmp_path, monkeypatch)
    for setting in OF_DENSE[1:]:
        found = json.loads((routing / f"{setting}-0.json").read_text())
        assert found["mask_from"] == "a mask of the same AT (Dense)"
        least, largest = found["mask_reachable"]
        assert least <= found["mask"]["clean"]["mean"] <= largest
    drawn = (tmp_path / "study-resnet18-fig6.svg").read_text()
    assert "AT (MoE) from AT (Dense), clean" in drawn
    assert "AdvMoE from AT (Dense), attacked" in drawn
    assert "gate advantage" not in drawn


def test_the_agreement_counts_equal_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    agreement = runpy.run_path(str(STUDIES / "small.py"))["agreement"]
    model = TwoRooms()
    images = ImageSet(np.full((3, 8, 8, 3), 200, np.uint8), np.zeros(3, np.int64), ("dark", "light"))
    assert agreement(model, model, images) == 1.0
    assert agreement(model, controlled(model, "inverted", 0, calibration=()), images) == 0.0


def packed(*right: int) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def test_the_tables_of_attacks_on_the_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [""])
    module = runpy.run_path(str(STUDIES / "tables.py"))

    def cell(seed: int, clean: str, pgd_bits: str, **test: Any) -> dict[str, Any]:
        return {
            "seed": seed,
            "gflops": 0.0023,
            "parameters": 10,
            "curve": [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}],
            "test": {
                "images": 4,
                "sa": 10.0 * seed,
                "ra_pgd": 5.0 * seed,
                "correct": {"clean": clean, "pgd": pgd_bits},
                **test,
            },
        }

    routing = {"images": 2, "ra_views": 40.0, "ra_worst": 30.0, "decisions_flipped": 1.0, "images_flipped": 2.0}
    moe = cell(1, packed(1, 1, 0, 0), packed(1, 0, 0, 0), routing=routing, starts={"ra": 45.0}, controls={})
    s_dense = [
        cell(seed, packed(1, 1, 1, 1), packed(*bits), starts={"ra": ra})
        for seed, bits, ra in ((0, (0, 0, 1, 1), 1.0), (1, (1, 1, 0, 0), 90.0), (2, (1, 0, 0, 0), 2.0))
    ]
    long = [cell(1, packed(1, 1, 1, 1), packed(1, 0, 0, 0), starts={"ra": 50.0})]
    row = module["attack_table"]([("at_moe", moe)], s_dense, long)[-1]
    assert row == ("| AT (MoE), gate advantage | 1 | 100.0 | 50.0; 45.0 | 40.0 | 30.0 | 100.0; 90.0 | 1.0; 2.0 | - |")
    row = module["attack_table"]([("at_moe_long", moe)], s_dense, long)[-1]
    assert "| 30.0 | 50.0; 50.0 |" in row
    row = module["training_table"]({"s_dense": s_dense}, s_dense)[-1]
    # the loss of the last epoch; SA of 0, 10 and 20 and RA of 0, 5 and 10
    assert row == "| AT (S-Dense) | 0, 1, 2 | 2; - | 10 | 2.30 | 1.000 | 10.0 (± 10.0) | 5.0 (± 5.0) | - | - |"


def test_all_seeds_are_loaded_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [""])
    for seed in (10, 2, 0):
        (tmp_path / f"dense-{seed}.json").write_text(json.dumps({"setting": "dense", "seed": seed}))
    load = runpy.run_path(str(STUDIES / "tables.py"))["load"]
    assert [cell["seed"] for cell in load(tmp_path)["dense"]] == [0, 2, 10]
