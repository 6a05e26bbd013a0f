"""Several ranks compute the same as one process with the union of their batches, and fail together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch

from advmoe.training.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    (found,) = ranks.run(ranks.alone, 1, folder)
    return found


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return ranks.run(ranks.two, 2, folder)


@pytest.fixture(scope="module")
def three(folder: Path, two: Any) -> list[dict[str, Any]]:
    return ranks.run(ranks.three, 3, folder)


def assert_same_run(path: Path, reference: Path) -> None:
    """Weights, statistics and moving averages to 1e-12; figures and routes exactly."""
    checkpoint, wanted = (load_checkpoint(folder / "last.pt") for folder in (path, reference))
    for ours, theirs in ((checkpoint.weights, wanted.weights), (checkpoint.training_weights, wanted.training_weights)):
        assert (ours is None) == (theirs is None)
        for name, tensor in (theirs or {}).items():
            torch.testing.assert_close((ours or {})[name], tensor, rtol=1e-12, atol=1e-12, msg=name)
    figures, wanted_figures = (
        [{**json.loads(line), "images_per_second": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (path, reference)
    )
    assert figures == wanted_figures
    routes = [folder / "routes.npz" for folder in (path, reference)]
    assert len({file.read_bytes() if file.exists() else b"" for file in routes}) == 1


@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_train_as_one_process_with_the_union_batch(
    case: str, folder: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert two[0][case] == two[1][case]
    assert_same_run(folder / "two" / case, folder / "one" / case)


def test_images_that_are_skipped_count_on_no_rank(folder: Path, two: list[dict[str, Any]]) -> None:
    (record,) = (json.loads(line) for line in (folder / "two" / "skipping" / "metrics.jsonl").read_text().splitlines())
    assert record["train_skipped"] == 3, "of the 16 training images"


@pytest.mark.parametrize(("case", "left"), [("one left", 1), ("none left", 0)])
def test_a_batch_with_too_few_images_left_is_skipped_by_all_ranks(
    case: str, left: int, folder: Path, two: list[dict[str, Any]]
) -> None:
    run = folder / "two" / case
    (record,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (record["train_steps_skipped"], record["train_skipped"]) == (1, 8 - left)
    (update,) = (json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines())
    assert (update["step"], update["level"], len(update["images"])) == (1, "all", left)


def test_an_image_that_one_rank_cannot_read_stops_all_with_one_message(two: list[dict[str, Any]]) -> None:
    first, second = (found["damaged"] for found in two)
    assert first == second
    assert "mend the file or skip bad images, then resume the run" in first


@pytest.mark.parametrize("case", ["advmoe", "few"])
def test_shares_need_not_be_equal_and_may_be_empty(
    case: str, folder: Path, one: dict[str, Any], three: list[dict[str, Any]]
) -> None:
    assert three[0][case] == three[1][case] == three[2][case]
    assert_same_run(folder / "three" / case, folder / "one" / case)


def test_a_run_goes_on_with_another_number_of_ranks(
    folder: Path, one: dict[str, Any], three: list[dict[str, Any]]
) -> None:
    assert three[0]["stopped"] == three[1]["stopped"] == three[2]["stopped"]
    assert_same_run(folder / "stopped", folder / "one" / "advmoe")


@pytest.mark.parametrize("name", ["suite", "suite goes on"])
def test_an_evaluation_gives_the_same_bits_in_every_world(
    name: str, folder: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    wanted = one["suite"]
    assert wanted.arrays["index"].tolist() == list(range(20))
    for found in (each[name] for each in two):
        assert found.arrays.keys() == wanted.arrays.keys()
        for column, values in wanted.arrays.items():
            np.testing.assert_array_equal(found.arrays[column], values, err_msg=column)
        assert found.diagnostics == wanted.diagnostics
        assert found.pathways_used == wanted.pathways_used
    kept = {path.name for path in folder.glob("suite-*")}
    assert kept == {f"suite-{world}{ending}" for world in ("one", "two") for ending in (".npz", "-diagnostics.json")}


def test_what_is_reproduced_together_is_known_to_all_and_not_done_again(two: list[dict[str, Any]]) -> None:
    assert [found["reproduce"] for found in two] == [[{"ra": 12.5}, {"ra": 12.5}]] * 2


@pytest.mark.parametrize("where", ["attack", "loss"])
def test_what_is_not_finite_on_one_rank_leaves_all_ranks_unmoved(where: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        taken, unmoved = found[f"nan in {where}"]
        assert not taken
        assert unmoved


@pytest.mark.slow
def test_a_rank_that_is_killed_is_restarted_and_the_run_goes_on(tmp_path: Path) -> None:
    options = "--arch vgg16 --width 0.0625 --epochs 2 --batch-size 16 --limit-train 48 --val-limit 20 --device cpu"
    options += " --checkpoint-minutes 0"
    weights = []
    for name, program in (("killed", "killed_rank.py"), ("whole", "-m advmoe")):
        start = ["--nproc-per-node", "2", "--max-restarts", "1"]
        script = [str(Path(__file__).with_name(program))] if program.endswith(".py") else program.split()
        line = [sys.executable, "-m", "torch.distributed.run", *start, *script, "train", "digits", *options.split()]
        done = subprocess.run([*line, "--out", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        weights.append(load_checkpoint(tmp_path / name / "last.pt").weights)
    killed, whole = weights
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
