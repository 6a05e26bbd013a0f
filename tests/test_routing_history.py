"""The route log of a run: its counts, its size, and its resumption."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from advmoe.data.loader import Batch
from advmoe.errors import DataError
from advmoe.models.routing import Routing
from advmoe.routing_log import RouteLog
from advmoe.training import routing_history
from advmoe.training.routing_history import RoutingHistory
from advmoe.training.steps import StepResult


def history(num_layers: int = 2, *, tokens: int = 1, num_images: int = 100) -> RoutingHistory:
    model: Any = SimpleNamespace(
        expert_layouts=(None,) * num_layers, rows_per_image=tokens, config=SimpleNamespace(num_experts=2)
    )
    return RoutingHistory(model, num_images)


def add(
    log: RoutingHistory,
    epoch: int,
    indices: list[int],
    clean: list[list[int]],
    attacked: Any = None,
    *,
    taken: bool = True,
) -> None:
    batch = Batch(
        torch.zeros(len(indices), 3, 1, 1), torch.zeros(len(indices), dtype=torch.int64), torch.tensor(indices)
    )
    routings = [None if experts is None else Routing(torch.tensor(experts), None) for experts in (clean, attacked)]
    nothing = torch.zeros(())
    assert routings[0] is not None
    seen = (nothing, batch.indices, nothing, None, routings[0], routings[1])
    log.add(epoch, batch, StepResult(*seen, torch.tensor(taken)))


def test_an_epochs_figures_are_those_of_its_clean_images() -> None:
    log = history()
    add(log, 1, [4, 7], [[0, 1], [0, 0]], [[1, 1], [1, 1]])
    add(log, 1, [0, 9], [[0, 1], [1, 0]], [[1, 1], [1, 1]])
    # Layer 0 sends three of four images to expert 0, layer 1 two to each. In bits, the entropy of
    # 3/4 and 1/4 is 2 - 3/4 log2 3 = 0.8113.
    assert log.figures(1) == {"router_load": [0.75, 0.5], "router_entropy": [0.8113, 1.0]}


def test_a_skipped_step_is_not_logged(tmp_path: Path) -> None:
    log = history()
    add(log, 1, [4, 7], [[0, 1], [0, 0]], [[1, 1], [1, 1]])
    add(log, 1, [0, 9], [[0, 0], [0, 0]], [[0, 0], [0, 0]], taken=False)
    assert log.figures(1) == {"router_load": [1.0, 0.5], "router_entropy": [0.0, 1.0]}
    log.save(tmp_path / "routes.npz")
    kept = RouteLog.load(tmp_path / "routes.npz")
    assert [sorted(kept.routes((name, 1)).indices) for name in ("clean", "pgd")] == [[4, 7], [4, 7]]


def test_changes_are_counted_for_the_images_of_both_epochs() -> None:
    log = history()
    add(log, 1, [4, 7, 0], [[0, 1], [0, 0], [1, 1]])
    add(log, 2, [7, 5, 4], [[1, 1], [0, 0], [0, 0]])
    # Image 7: 00 -> 11, image 4: 01 -> 00; images 0 and 5 have no partner.
    found = log.figures(2)
    assert found["router_changed"] == [0.5, 1.0]
    assert found["train_pathways_changed"] == 100.0


def test_epochs_without_a_common_image_have_no_changes() -> None:
    log = history()
    add(log, 1, [4, 7], [[0, 1], [0, 0]])
    add(log, 2, [0, 5], [[1, 1], [0, 0]])
    assert log.figures(2) == {"router_load": [0.5, 0.5], "router_entropy": [1.0, 1.0]}


def test_an_epoch_without_a_step_has_no_figures() -> None:
    log = history()
    add(log, 1, [4, 7], [[0, 1], [0, 0]], taken=False)
    assert log.figures(1) == {}


def test_tokens_of_a_layer_count_together() -> None:
    log = history(num_layers=2, tokens=2)
    add(log, 1, [0], [[0, 0, 0, 1]])
    assert log.figures(1) == {"router_load": [1.0, 0.5], "router_entropy": [0.0, 1.0]}
    add(log, 2, [0], [[0, 1, 1, 0]])
    assert log.figures(2)["router_changed"] == [0.5, 1.0]


def test_evenness_is_relative_to_the_experts_of_each_layer() -> None:
    log = RouteLog([2, 4])
    log.append("clean", range(4), [[0, 0], [1, 1], [0, 2], [1, 3]])
    load = log.expert_load("clean")
    # In bits, equal shares have an entropy of log2 2 = 1 and log2 4 = 2.
    assert load.entropy[:, 0].tolist() == [1.0, 2.0]
    assert load.evenness[:, 0].tolist() == [1.0, 1.0]
    assert load.merged(2).evenness[:, 0].tolist() == [1.0, 1.0]


def test_a_network_without_routers_has_no_log(tmp_path: Path) -> None:
    log = history(num_layers=0)
    add(log, 1, [0], [[]])
    log.save(tmp_path / "routes.npz")
    assert log.figures(1) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_epochs_are_kept(tmp_path: Path) -> None:
    log = history()
    for epoch in (1, 2, 3):
        add(log, epoch, [0], [[0, 1]], [[1, 1]])
    log.save(tmp_path / "routes.npz")
    kept = RouteLog.load(tmp_path / "routes.npz").conditions
    assert kept == (("clean", 2), ("clean", 3), ("pgd", 2), ("pgd", 3))


def test_of_more_images_than_fit_every_kth_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two epochs of 100 images under two conditions, 2 + 16 bytes each, are 7,200 bytes; every third
    # image is 2,400.
    monkeypatch.setattr(routing_history, "MOST_BYTES", 2_400)
    log = history()
    add(log, 1, list(range(10)), [[0, 1]] * 10)
    log.save(tmp_path / "routes.npz")
    assert RouteLog.load(tmp_path / "routes.npz").routes(("clean", 1)).indices.tolist() == [0, 3, 6, 9]


def test_steps_done_again_after_a_crash_change_nothing(tmp_path: Path) -> None:
    # The log is written before the checkpoint: after a crash in between it holds steps that the
    # checkpoint does not.
    whole, ahead, resumed = history(), history(), history()
    steps = [(1, [0, 1]), (1, [2, 3]), (2, [3, 1]), (2, [0, 2])]
    for epoch, indices in steps:
        add(whole, epoch, indices, [[epoch % 2, index % 2] for index in indices])
    for epoch, indices in steps[:3]:
        add(ahead, epoch, indices, [[epoch % 2, index % 2] for index in indices])
    ahead.save(tmp_path / "ahead.npz")
    resumed.resume(tmp_path / "ahead.npz", 1)
    for epoch, indices in steps[1:]:
        add(resumed, epoch, indices, [[epoch % 2, index % 2] for index in indices])
    assert resumed.figures(2) == whole.figures(2)
    for log, name in ((whole, "whole"), (resumed, "resumed")):
        log.save(tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_a_run_that_went_back_forgets_the_epochs_it_left(tmp_path: Path) -> None:
    whole = history()
    for epoch in (1, 2, 3):
        add(whole, epoch, [0, 1], [[0, 1], [1, 1]], [[1, 1], [0, 1]])
    whole.save(tmp_path / "routes.npz")
    for epoch, kept in (
        (1, ()),
        (2, (("clean", 2), ("pgd", 2))),
        (3, RouteLog.load(tmp_path / "routes.npz").conditions),
    ):
        log = history()
        log.resume(tmp_path / "routes.npz", epoch)
        log.save(tmp_path / "resumed.npz")
        assert RouteLog.load(tmp_path / "resumed.npz").conditions == kept
    assert (tmp_path / "resumed.npz").read_bytes() == (tmp_path / "routes.npz").read_bytes()


def test_a_run_goes_on_without_its_log_but_not_with_a_damaged_one(tmp_path: Path) -> None:
    log = history()
    log.resume(tmp_path / "routes.npz", 1)
    (tmp_path / "routes.npz").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"routes.npz is not a route log or is damaged"):
        log.resume(tmp_path / "routes.npz", 1)


def test_the_route_log_of_an_evaluation_is_not_taken_for_that_of_a_run(tmp_path: Path) -> None:
    evaluated = RouteLog([2, 2])
    for condition in ("clean", "pgd", "worst"):  # of epoch 0
        evaluated.append(condition, [0, 1], [[0, 0], [0, 0]])
    evaluated.save(tmp_path / "routes.npz")
    log = history()
    log.resume(tmp_path / "routes.npz", 1)
    add(log, 1, [0, 1], [[1, 1], [1, 1]])
    assert log.figures(1) == {"router_load": [1.0, 1.0], "router_entropy": [0.0, 0.0]}  # no change from epoch 0
    log.save(tmp_path / "resumed.npz")
    assert RouteLog.load(tmp_path / "resumed.npz").conditions == (("clean", 1),)
    history(num_layers=3).resume(tmp_path / "routes.npz", 1)  # whatever model was evaluated
