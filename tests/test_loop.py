"""The training loop: exact resumption, selection on validation images, and the files of a run."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import MODEL, STANDARD, TRAIN, Observer, assert_identical, contents, resumed, scripted, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advmoe.attacks.pgd import starting_point
from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.sets import EncodedSet
from advmoe.data.sources import Dataset, ImageSet, load_dataset
from advmoe.data.transforms import CropFlip
from advmoe.errors import CheckpointError, ConfigError, DataError, TrainingError
from advmoe.models.registry import build_model
from advmoe.models.routing import Routing
from advmoe.routing_log import RouteLog
from advmoe.training import loop, split, steps, streams
from advmoe.training.average import WeightAverage
from advmoe.training.checkpoint import load_checkpoint
from advmoe.training.epoch_sums import EpochSums
from advmoe.training.guard import Watch, take_step
from advmoe.training.levels import IN_WORDS
from advmoe.training.loop import Trainer
from advmoe.training.methods import METHODS, doubts
from advmoe.training.run_folder import RunFolder
from advmoe.training.split import Split, split_dataset
from advmoe.training.start import with_new_classifier
from advmoe.training.steps import StepResult


def test_a_run_leaves_what_it_promises(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert {name for name in names if not name.startswith("events.")} == {
        "config.json",
        "metrics.jsonl",
        "routes.npz",
        "last.pt",
        "best.pt",
    }
    assert any(name.startswith("events.") for name in names)
    config = json.loads((whole_run / "config.json").read_text())
    assert config["model"]["arch"] == "vgg16"
    assert config["train"]["limit_train"] == 16
    records = contents(whole_run)["records"]
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert 0 <= record["val_ra_pgd1"] <= record["val_sa"] <= 100
        assert len(record["router_load"]) == 12
        assert all(0.5 <= load <= 1 for load in record["router_load"]), "the busiest of two experts has half at least"
        assert len(record["router_entropy"]) == 12
        assert {"train_loss", "train_sa", "train_ra", "routers_loss", "routers_sa"} <= record.keys()
    assert "router_changed" not in records[0], "there is no epoch before"
    assert len(records[1]["router_changed"]) == 12
    assert 0 <= records[1]["train_pathways_changed"] <= 100
    log = RouteLog.load(whole_run / "routes.npz")
    assert log.conditions == (("clean", 1), ("clean", 2), ("pgd", 1), ("pgd", 2))
    assert len(log.routes(("clean", 2)).indices) == 16
    assert (log.expert_load(("clean", 2)).share.max(axis=(1, 2)).round(4) == records[1]["router_load"]).all()
    best = load_checkpoint(whole_run / "best.pt")
    assert best.class_names == tuple("0123456789")
    assert best.optimizers == []
    assert best.progress == {}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    digits: Dataset, whole_run: Path, tmp_path: Path
) -> None:
    train(digits, tmp_path / "again")
    assert_identical(contents(tmp_path / "again"), contents(whole_run))
    train(digits, tmp_path / "other", dataclasses.replace(TRAIN, seed=1))
    other, first = load_checkpoint(tmp_path / "other" / "last.pt"), load_checkpoint(whole_run / "last.pt")
    assert not torch.equal(other.weights["classifier.weight"], first.weights["classifier.weight"])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_interrupted_after_any_step_goes_on_bit_for_bit(
    digits: Dataset, whole_run: Path, tmp_path: Path, step: int
) -> None:
    stopping, going_on = Observer(stop_after=step), Observer()
    assert not train(digits, tmp_path / "run", observer=stopping)
    assert resumed(digits, tmp_path / "run", observer=going_on)
    assert stopping.steps + going_on.steps == [1, 2, 3, 4], "no step twice, none left out"
    assert_identical(contents(tmp_path / "run"), contents(whole_run))


def test_a_crash_loses_the_steps_since_the_last_checkpoint_only(
    digits: Dataset, whole_run: Path, tmp_path: Path
) -> None:
    going_on = Observer()
    with pytest.raises(MemoryError):
        train(digits, tmp_path / "run", observer=Observer(fail_after=4))
    assert resumed(digits, tmp_path / "run", observer=going_on)
    assert going_on.steps == [3, 4], "the first epoch, 2 steps, was saved"
    assert_identical(contents(tmp_path / "run"), contents(whole_run))


def test_checkpoints_in_mid_epoch_are_made_by_the_clock(digits: Dataset, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        train(digits, tmp_path / "run", observer=Observer(fail_after=2), minutes=0)
    going_on = Observer()
    assert resumed(digits, tmp_path / "run", observer=going_on)
    assert going_on.steps == [2, 3, 4], "step 1 was saved in the middle of its epoch"
    assert_identical(contents(tmp_path / "run"), contents(whole_run))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "at", "ema": 0.9},
        {"method": "standard"},
        {"loss": "pgd_at", "awp": 0.005, "balance": 0.1},
        {"router_step": "reuse", "router_share": 0.5, "router_every": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_way_of_training_resumes_bit_for_bit(digits: Dataset, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TRAIN, **changes)
    train(digits, tmp_path / "whole", config)
    assert not train(digits, tmp_path / "run", config, observer=Observer(stop_after=3))
    assert resumed(digits, tmp_path / "run", config)
    assert_identical(contents(tmp_path / "run"), contents(tmp_path / "whole"))


def test_the_moving_average_is_what_is_kept(digits: Dataset, tmp_path: Path) -> None:
    class Witness(Observer):
        def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
            assert self.trainer is not None
            seen.append(self.trainer.model.classifier.weight.detach().clone())  # type: ignore[union-attr, operator]

    seen: list[Tensor] = []
    train(digits, tmp_path / "run", dataclasses.replace(STANDARD, ema=0.75), observer=Witness())
    average = seen[0]  # the average begins at the first weights, then takes a quarter of the new ones
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.training_weights is not None
    assert torch.equal(last.training_weights["classifier.weight"], seen[-1])
    torch.testing.assert_close(last.weights["classifier.weight"], average)


def test_the_moving_average_has_the_bits_of_torchs() -> None:
    torch.manual_seed(0)
    model = build_model(MODEL)
    ours = WeightAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model.train()(torch.rand(4, 3, 32, 32))
        ours.update()
        theirs.update_parameters(model)
    counts, theirs_of = 0, theirs.module.state_dict()
    for name, value in ours.network.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, theirs_of[name]), name
        else:
            counts += 1
            assert value == 3, "numbers of batches are not averaged"
    assert counts


def test_a_network_without_counts_is_averaged_too() -> None:
    model = nn.Linear(2, 1)
    average = WeightAverage(model, 0.5)  # type: ignore[arg-type]
    average.update()
    assert torch.equal(average.network.weight, model.weight)  # type: ignore[arg-type]


def test_a_run_starts_from_the_weights_it_is_given(digits: Dataset, whole_run: Path, tmp_path: Path) -> None:
    given, cpu = load_checkpoint(whole_run / "best.pt"), torch.device("cpu")
    with RunFolder(tmp_path / "run") as folder:
        trainer = Trainer(MODEL, TRAIN, digits, folder, device=cpu, observer=Observer(), initial=given)
    assert_identical(dict(trainer.model.state_dict()), given.weights)


@pytest.mark.parametrize("changed", ["names", "number"])
def test_a_run_with_other_classes_keeps_the_features_of_its_start_and_gets_a_new_classifier(
    digits: Dataset, whole_run: Path, tmp_path: Path, changed: str
) -> None:
    given, cpu = load_checkpoint(whole_run / "best.pt"), torch.device("cpu")
    if changed == "names":
        given = dataclasses.replace(given, class_names=given.class_names[::-1])
    else:
        given = with_new_classifier(given, 7, seed=1)
    before = given.weights
    with RunFolder(tmp_path / "run") as folder:
        trainer = Trainer(MODEL, TRAIN, digits, folder, device=cpu, observer=Observer(), initial=given)
    assert trainer.new_classifier
    after = trainer.model.state_dict()
    differ = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert differ == {"classifier.weight", "classifier.bias"}
    assert len(after["classifier.bias"]) == 10
    fixed = dataclasses.replace(TRAIN, method="router_at", init="0" * 64)
    with (
        pytest.raises(ConfigError, match="so its classifier has to be trained anew, and method router_at trains none"),
        RunFolder(tmp_path / "other") as folder,
    ):
        Trainer(MODEL, fixed, digits, folder, device=cpu, observer=Observer(), initial=given)


def test_resuming_a_complete_run_does_nothing(digits: Dataset, whole_run: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole_run.iterdir() if path.suffix == ".pt"}
    observer = Observer()
    assert resumed(digits, whole_run, observer=observer)
    assert observer.steps == []
    assert {path.name: path.read_bytes() for path in whole_run.iterdir() if path.suffix == ".pt"} == before


def test_a_line_of_metrics_that_a_crash_cut_short_is_no_obstacle(
    digits: Dataset, whole_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        train(digits, tmp_path / "run", observer=Observer(fail_after=3))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "val_s')
    assert resumed(digits, tmp_path / "run")
    assert_identical(contents(tmp_path / "run"), contents(whole_run))


def test_the_best_checkpoint_is_the_latest_that_is_not_clearly_worse(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten images. From 5 robust ones to 2, three are lost and none gained: 3 > sqrt(3). One lost
    # image is no reason.
    for name, shares, best in (
        ("falls", (0.5, 0.2), 1),
        ("rises", (0.2, 0.5), 2),
        ("stays", (0.5, 0.5), 2),
        ("one", (0.5, 0.4), 2),
    ):
        monkeypatch.setattr(loop, "evaluate", scripted(*shares))
        train(digits, tmp_path / name, STANDARD)
        checkpoint = load_checkpoint(tmp_path / name / "best.pt")
        assert checkpoint.metrics["epoch"] == best
        assert checkpoint.metrics["val_ra_pgd1"] == 100 * shares[best - 1]
        last = load_checkpoint(tmp_path / name / "last.pt")
        same = torch.equal(checkpoint.weights["classifier.weight"], last.weights["classifier.weight"])
        assert same == (best == 2)


def test_the_dense_network_that_a_sparse_one_begins_as_is_never_its_best(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sparse(Observer):
        def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
            assert epochs == 3, "one for each phase"

    monkeypatch.setattr(loop, "evaluate", scripted(0.9, 0.5, 0.2))
    config = dataclasses.replace(TRAIN, method="at_sparse", epochs=1)
    train(digits, tmp_path / "run", config, model=dataclasses.replace(MODEL, kind="sparse_cnn"), observer=Sparse())
    assert load_checkpoint(tmp_path / "run" / "best.pt").metrics["epoch"] == 3


def test_a_resumed_run_remembers_the_best(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "evaluate", scripted(0.5, 0.2))
    assert not train(digits, tmp_path / "run", STANDARD, observer=Observer(stop_after=2))
    assert resumed(digits, tmp_path / "run", STANDARD)
    assert load_checkpoint(tmp_path / "run" / "best.pt").metrics["epoch"] == 1


def test_the_test_images_are_never_touched(digits: Dataset, tmp_path: Path, whole_run: Path) -> None:
    without_test: Any = SimpleNamespace(info=digits.info, train=digits.train)  # any use of .test raises
    train(without_test, tmp_path / "run")
    assert_identical(contents(tmp_path / "run"), contents(whole_run))


def test_training_and_validation_images_are_disjoint(digits: Dataset) -> None:
    assert isinstance(digits.train, ImageSet)
    images = digits.train.images.copy()
    images[:, 0, 0, 0] = np.arange(200)  # a number for every image, so that validation images can be told
    numbered: Any = SimpleNamespace(info=digits.info, train=dataclasses.replace(digits.train, images=images))
    split = split_dataset(numbered, dataclasses.replace(TRAIN, limit_train=None, val_limit=1000))
    validation = set(split.validation.images[:, 0, 0, 0].tolist())
    assert len(split.validation) == len(validation) == 20, "a tenth of 200"
    assert set(split.train_indices.tolist()) == set(range(200)) - validation


def test_limits_choose_among_the_images_of_their_own_half(digits: Dataset) -> None:
    def split(**limits: Any) -> Split:
        return split_dataset(digits, dataclasses.replace(TRAIN, **limits))

    whole, limited = split(limit_train=None, val_limit=1000), split(limit_train=16, val_limit=10)
    assert len(limited.train_indices) == len(set(limited.train_indices.tolist())) == 16
    assert set(limited.train_indices.tolist()) < set(whole.train_indices.tolist())
    assert len(limited.validation) == 10
    np.testing.assert_array_equal(limited.train_indices, split(limit_train=16, val_limit=10).train_indices)
    assert split(limit_train=16, seed=1).train_indices.tolist() != limited.train_indices.tolist()
    # Each limit has a choice of its own, so that runs of different sizes are compared on the same
    # validation images.
    np.testing.assert_array_equal(split(limit_train=None).validation.images, limited.validation.images)
    np.testing.assert_array_equal(split(val_limit=1000).train_indices, limited.train_indices)
    assert len(split(limit_train=10**6).train_indices) == len(whole.train_indices)


def test_a_diverged_run_stops_with_its_last_checkpoint_intact(digits: Dataset, tmp_path: Path) -> None:
    class Sabotage(Observer):
        def validated(self, record: dict[str, Any]) -> None:
            assert self.trainer is not None
            nn.init.constant_(self.trainer.model.classifier.bias, float("nan"))  # type: ignore[union-attr, arg-type]

    # an epoch has 2 steps: so many in a row end the run
    message = r"not finite in 2 updates of the network in a row, up to step 4.*lower the learning rate"
    with pytest.raises(TrainingError, match=message):
        train(digits, tmp_path / "run", STANDARD, observer=Sabotage())
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.progress["step"] == 2
    assert all(value.isfinite().all() for value in last.weights.values())


def test_a_network_that_is_no_longer_finite_after_an_epoch_has_diverged(digits: Dataset, tmp_path: Path) -> None:
    class Sabotage(Observer):
        def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
            assert self.trainer is not None
            nn.init.constant_(self.trainer.model.classifier.bias, float("inf"))  # type: ignore[union-attr, arg-type]

    message = r"training has diverged: after epoch 1 .* not finite; .*last\.pt is from before; lower the learning rate"
    with pytest.raises(TrainingError, match=message) as caught:
        train(digits, tmp_path / "run", STANDARD, observer=Sabotage())
    assert caught.value.options == ("lr",)


@pytest.mark.parametrize(("threshold", "warnings"), [(0.5, 1), (1.1, 0)])
def test_a_collapsed_router_is_pointed_out_once_with_its_layer_and_load(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, warnings: int
) -> None:
    # The busiest of two experts has at least half of the images, and never more than all of them;
    # there are 2 epochs.
    monkeypatch.setattr(loop, "COLLAPSED_LOAD", threshold)
    observer = Observer()
    train(digits, tmp_path / "run", STANDARD, observer=observer)
    found = [warning for warning in observer.warnings if "one expert" in warning]
    assert len(found) == warnings
    loads = observer.records[0]["router_load"]
    for warning in found:
        shown = ", ".join(f"{layer} ({100 * load:.1f} %)" for layer, load in enumerate(loads))
        assert f"epoch 1: routers send nearly every image to one expert, in MoE layer {shown};" in warning
        assert observer.advice[observer.warnings.index(warning)] == {"balance": 0.01}


def test_the_remedy_for_collapsed_routers_is_told_once(digits: Dataset, tmp_path: Path) -> None:
    observer = Observer()
    train(digits, tmp_path / "run", STANDARD, observer=observer)
    assert observer.trainer is not None
    before, few = len(observer.warnings), len(observer.trainer.model.expert_layouts)
    for epoch, loads in enumerate(([1.0, 0.5], [1.0, 0.5], [1.0, 1.0]), start=3):
        observer.trainer._warn_of_collapse(epoch, [*loads, *[0.5] * (few - 2)])
    assert observer.advice[before:] == [{"balance": 0.01}, {}]
    assert observer.warnings[-1] == "epoch 5: routers send nearly every image to one expert, in MoE layer 1 (100.0 %)"


class Spoiling(Observer):
    """Makes the logits of the step after this one NaN."""

    def __init__(self, after: int, **more: Any) -> None:
        super().__init__(**more)
        self.after = after
        self.unmoved: bool | None = None

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        assert self.trainer is not None
        classifier = self.trainer.model.classifier
        assert isinstance(classifier, nn.Linear)
        if step == self.after:
            self.before = self.state()
            always = self.trainer.levels[0].name == "routers"  # in whose step the classifier is in eval mode
            self.hook = classifier.register_forward_hook(
                lambda layer, _, logits: logits * torch.nan if layer.training or always else logits
            )
        if step == self.after + 1:
            self.hook.remove()
            after = self.state()
            self.unmoved = all(torch.equal(after[name], value) for name, value in self.before.items())
        super().stepped(step, images, figures)

    def state(self) -> dict[str, Tensor]:
        """Weights, statistics and momentum."""
        assert self.trainer is not None
        found = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        for number, level in enumerate(self.trainer.levels):
            for index, entry in level.optimizer.state_dict()["state"].items():
                found[f"momentum {number} {index}"] = entry["momentum_buffer"].clone()
        return found


@pytest.mark.parametrize("asked", [True, False], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("config", [TRAIN, dataclasses.replace(STANDARD, ema=0.9)], ids=["advmoe", "standard"])
def test_a_step_that_is_not_finite_leaves_no_trace_but_its_note(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, asked: bool
) -> None:
    monkeypatch.setattr(steps, "take_step", functools.partial(take_step, ask=asked))
    observer = Spoiling(1)
    assert train(digits, tmp_path / "run", config, observer=observer)
    assert observer.unmoved
    updates = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    levels = ["routers", "experts"] if config is TRAIN else ["all"]
    assert [(update["step"], update["level"], update["loss"]) for update in updates] == [
        (2, level, "nan") for level in levels
    ]
    assert observer.trainer is not None
    for update, loader in zip(updates, observer.trainer.streams.loaders, strict=True):
        assert update["images"] == list(loader.epoch(0))[1].indices.tolist()
    for level in levels:
        assert f"step 2: the update of the {IN_WORDS[level]} was not finite (loss nan)" in " ".join(observer.warnings)
    first, second = observer.records
    assert [first[f"{'train' if level != 'routers' else level}_steps_skipped"] for level in levels] == [1] * len(levels)
    assert math.isfinite(first["train_loss"])
    assert "train_steps_skipped" not in second
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "run" / "last.pt").weights.values())


def test_a_run_goes_on_after_a_skipped_step_bit_for_bit(digits: Dataset, tmp_path: Path) -> None:
    """The same step is spoiled in a whole run and in one that stopped just after it."""
    train(digits, tmp_path / "whole", STANDARD, observer=Spoiling(2))
    assert not train(digits, tmp_path / "run", STANDARD, observer=Spoiling(2, stop_after=3))
    assert load_checkpoint(tmp_path / "run" / "last.pt").progress["failed_in_a_row"] == [1]
    with (tmp_path / "run" / "skipped.jsonl").open("a") as file:  # what a crash left of later steps
        file.write('{"step": 4, "level": "all", "loss": "nan", "images": []}\n{"st')
    assert resumed(digits, tmp_path / "run", STANDARD)
    assert_identical(contents(tmp_path / "run"), contents(tmp_path / "whole"))
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == (tmp_path / "whole" / "skipped.jsonl").read_text()


def test_a_folder_that_holds_a_run_is_not_written_to(digits: Dataset, whole_run: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole_run.iterdir()}
    with pytest.raises(ConfigError, match=r"already holds a run; continue it or choose another folder"):
        train(digits, whole_run)
    assert {path.name: path.read_bytes() for path in whole_run.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 0.05}, "lr = 0.1"), ({"epochs": 3}, "epochs = 2"), ({"seed": 5}, "seed = 0"), ({"ema": 0.5}, "ema = 0")],
)
def test_a_run_is_not_resumed_with_other_settings(
    digits: Dataset, whole_run: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot resume .* started with {message}.*repeat the original options"):
        resumed(digits, whole_run, dataclasses.replace(TRAIN, **changes))


def test_a_run_is_not_resumed_with_another_model(digits: Dataset, whole_run: Path) -> None:
    with pytest.raises(CheckpointError, match="num_experts = 2"):
        resumed(digits, whole_run, model=dataclasses.replace(MODEL, num_experts=1))


def test_a_run_is_not_resumed_with_other_images(digits: Dataset, tmp_path: Path) -> None:
    assert not train(digits, tmp_path / "run", STANDARD, observer=Observer(stop_after=3))
    records = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    fewer = dataclasses.replace(digits, train=digits.train.take(np.arange(len(digits.train) - 1)))
    with pytest.raises(CheckpointError, match=r"the data set has other images or labels .*; restore them") as caught:
        resumed(fewer, tmp_path / "run", STANDARD)
    assert caught.value.options == ("init", "out")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == records
    assert resumed(digits, tmp_path / "run", STANDARD)


def test_a_moving_average_counts_all_batches(digits: Dataset, tmp_path: Path) -> None:
    assert train(digits, tmp_path / "run", dataclasses.replace(STANDARD, ema=0.99))
    weights = load_checkpoint(tmp_path / "run" / "last.pt").weights
    assert {int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")} == {4}


def test_a_run_is_not_resumed_from_its_best_checkpoint(digits: Dataset, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no training state; resume needs the last.pt"):
        train(digits, tmp_path / "run", resume=load_checkpoint(whole_run / "best.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 5}, "it is at step 5 of 4"),
        ({"failed_in_a_row": [0, 0, 0]}, "it has another number of levels"),
        ({"sums": []}, "it has another number of levels"),
    ],
)
def test_a_run_does_not_go_on_from_a_place_that_it_does_not_have(
    digits: Dataset, whole_run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    last = load_checkpoint(whole_run / "last.pt")
    changed = dataclasses.replace(last, progress=last.progress | change)
    with pytest.raises(CheckpointError, match=f"last.pt does not fit the run it belongs to: {message}"):
        train(digits, tmp_path / "run", resume=changed)


@pytest.mark.parametrize(
    ("granularity", "attack_routing", "warned"),
    [("image", "fixed", True), ("image", "mixture", False), ("layer", "fixed", False)],
)
def test_a_decision_that_no_attack_in_training_sees_is_pointed_out(
    digits: Dataset, tmp_path: Path, granularity: Any, attack_routing: Any, warned: bool
) -> None:
    observer = Observer(stop_after=1)
    config = dataclasses.replace(TRAIN, attack_routing=attack_routing)
    train(digits, tmp_path, config, model=dataclasses.replace(MODEL, granularity=granularity), observer=observer)
    assert ({"attack_routing": "mixture"} in observer.advice) == warned


@pytest.mark.parametrize(
    ("changes", "model", "warned", "advised"),
    [
        ({}, {}, [], []),
        (
            {"attack": AttackConfig(steps=1, start="clean")},
            {},
            ["the KL divergence of TRADES has the gradient 0"],
            [{"start": "gaussian"}],
        ),
        ({"attack": AttackConfig(steps=1, start="clean"), "loss": "pgd_at"}, {}, [], []),
        (
            {},
            {"num_experts": 3, "model_scale": 0.8},
            ["specialization 0.25 has no effect: at N = 3 and r = 0.8"],
            [{"expert_filters": "separate"}],
        ),
        (
            {"attack": AttackConfig(steps=1, start="clean")},
            {"num_experts": 3, "model_scale": 0.8},
            ["the KL divergence of TRADES", "specialization 0.25 has no effect"],
            [{"start": "gaussian"}, {"expert_filters": "separate"}],
        ),
        ({"specialization": None}, {"num_experts": 3, "model_scale": 0.8}, [], []),
        ({}, {"num_experts": 3, "model_scale": 0.8, "expert_filters": "separate"}, [], []),
        ({}, {"model_scale": 1.0}, [], []),  # experts have the same filters, and cannot differ
    ],
)
def test_settings_that_do_less_than_expected_are_pointed_out(
    changes: dict[str, Any], model: dict[str, Any], warned: list[str], advised: list[dict[str, Any]]
) -> None:
    found = doubts(build_model(dataclasses.replace(MODEL, **model)), dataclasses.replace(TRAIN, **changes))
    assert [doubt.advice for doubt in found] == advised
    assert all(part in doubt.warning for part, doubt in zip(warned, found, strict=True))


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of the loaders that a run makes; nothing is loaded."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(streams, "BatchLoader", lambda *_, **settings: made.append(settings) or [1])
    return made


def test_images_travel_to_a_gpu_as_bytes_in_page_locked_memory(digits: Dataset, loaders: list[dict[str, Any]]) -> None:
    for device in ("cuda:0", "cpu"):
        streams.Streams(split_dataset(digits, TRAIN), MODEL, TRAIN, periods=(1,), device=torch.device(device))
    assert [(settings["dtype"], settings["pin_memory"]) for settings in loaders] == [
        (torch.uint8, True),
        (torch.float32, False),
    ]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"router_every": 3}, [0, 3, 6]),  # twice in the first epoch of four steps, and in the next one
        ({"router_step": "reuse"}, []),
    ],
)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_routers_batches_are_made_only_where_they_are_used(
    digits: Dataset, changes: dict[str, Any], wanted: list[int], start: int
) -> None:
    config = dataclasses.replace(TRAIN, batch_size=4, **changes)
    split, device = split_dataset(digits, config), torch.device("cpu")
    periods = METHODS["advmoe"].periods(config)
    found = streams.Streams(split, MODEL, config, periods=periods, device=device)
    whole = list(streams.Streams(split, MODEL, config, periods=(1, 1), device=device).batches(0, 2))
    assert found.steps_per_epoch == 4
    made = list(found.batches(start, 2))
    assert len(made) == 8 - start
    used = [step for step, batches in enumerate(made, start=start) if batches[0] is not None]
    assert used == [step for step in wanted if step >= start]
    for batches, others in zip(made, whole[start:], strict=True):
        for batch, other in zip(batches, others, strict=True):
            if batch is not None:
                assert other is not None
                assert torch.equal(batch.indices, other.indices)
                assert torch.equal(batch.images, other.images)


def test_the_note_of_a_failed_update_names_the_images_that_it_saw(digits: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, router_step="reuse", router_share=0.5)
    observer = Spoiling(1)
    assert train(digits, tmp_path / "run", config, observer=observer)
    updates = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert observer.trainer is not None
    batch = list(observer.trainer.streams.loaders[1].epoch(0))[1].indices.tolist()
    # every second image of the experts' batch
    assert {update["level"]: update["images"] for update in updates} == {"routers": batch[::2], "experts": batch}


def test_failures_in_a_row_are_counted_for_each_level() -> None:
    watch, rows, bad, good = Watch(), torch.tensor([3]), torch.tensor(False), torch.tensor(True)
    for step in range(6):  # the routers take every third step, and fail each time
        if step % 3 == 0:
            watch.add(step, "routers", rows, torch.tensor(torch.nan), bad)
        watch.add(step, "experts", rows, torch.tensor(1.0), bad if step == 4 else good)
    assert [(update.step, update.level) for update in watch.read()] == [(0, "routers"), (3, "routers"), (4, "experts")]
    assert watch.in_a_row == {"routers": 2, "experts": 0}


def test_validation_needs_an_image_that_can_be_decoded(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "in_memory", lambda images, *_, **__: images.take(np.arange(0)))
    with pytest.raises(DataError, match="none of the 10 validation images can be decoded"):
        split_dataset(digits, dataclasses.replace(TRAIN, val_limit=10, skip_bad_images=True))


OF_PETS = dataclasses.replace(TRAIN, dataset="folder", val_fraction=0.2)


@pytest.fixture
def pets(tmp_path: Path) -> Dataset:
    """30 training images in files that a test may damage."""
    generator = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "pets" / ("train" if number < 30 else "val") / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return load_dataset("folder", tmp_path / "pets")


def damage(images: object, rows: Iterable[int]) -> None:
    assert isinstance(images, EncodedSet)
    for row in rows:
        Path(images.files[row]).write_bytes(b"no image")


def test_a_run_that_a_bad_image_stopped_keeps_its_steps_and_goes_on_without_the_image(
    pets: Dataset, tmp_path: Path
) -> None:
    model = dataclasses.replace(MODEL, num_classes=2)
    config, skipping = OF_PETS, dataclasses.replace(OF_PETS, skip_bad_images=True)
    observer = Observer(stop_after=1)
    assert not train(pets, tmp_path / "look", config, model=model, observer=observer)
    assert observer.trainer is not None
    of_routers, of_experts = (set(next(each.epoch(0)).indices.tolist()) for each in observer.trainer.streams.loaders)
    rows = observer.trainer.split.train_indices
    later = [row for row in rows.tolist() if row not in of_routers | of_experts]
    damage(pets.train, later[:1])

    with pytest.raises(DataError, match="mend the file or skip bad images, then resume the run") as caught:
        train(pets, tmp_path / "run", config, model=model)
    assert caught.value.options == ("skip_bad_images", "resume")
    assert load_checkpoint(tmp_path / "run" / "last.pt").progress["step"] == 1
    observer = Observer()
    assert resumed(pets, tmp_path / "run", skipping, model=model, observer=observer)
    assert observer.steps == [2, 3, 4]
    assert train(pets, tmp_path / "whole", skipping, model=model)
    assert_identical(contents(tmp_path / "run"), contents(tmp_path / "whole"))
    # all 16 images of an epoch are in each level's batches, once
    for record in observer.records:
        assert (record["routers_skipped"], record["train_skipped"]) == (1, 1)
    assert observer.warnings[-1].startswith(f"epoch 2: skipped images: 1; image {later[0]} ")
    with pytest.raises(CheckpointError, match=r"skip_bad_images = True \(not False\)"):
        resumed(pets, tmp_path / "run", config, model=model)


@pytest.mark.parametrize(
    ("left", "changes"),
    [
        (0, {}),
        (1, {}),  # features of 1 x 1 of one image have no variance
        (1, {"router_step": "reuse", "router_every": 2}),
        (3, {"accumulate": 2}),  # parts of two images and of one
    ],
)
def test_an_update_with_too_few_images_left_is_left_out(
    pets: Dataset, tmp_path: Path, left: int, changes: dict[str, Any]
) -> None:
    model = ModelConfig(arch="resnet18", kind="moe", width=0.0625, num_classes=2, image_size=8)
    config = dataclasses.replace(OF_PETS, skip_bad_images=True, **changes)

    def spoil(trainer: Trainer) -> None:
        damage(pets.train, next(trainer.streams.loaders[-1].epoch(0)).indices.tolist()[left:])

    observer = Observer()
    assert train(pets, tmp_path / "run", config, model=model, observer=observer, before=spoil)
    record = observer.records[0]
    assert (record["train_steps_skipped"], record["train_skipped"]) == (1, 8 - left)
    updates = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    (images,) = (update["images"] for update in updates if (update["step"], update["level"]) == (1, "experts"))
    assert len(images) == left
    said = (
        f"step 1: the update of the experts had {left} images that can be read, too few for BatchNorm, and was left out"
    )
    assert any(warning.startswith(said) for warning in observer.warnings)
    # batches keep their numbers, so a run that stops at this one goes on with the same bits
    assert not train(pets, tmp_path / "again", config, model=model, observer=Observer(stop_after=1))
    assert resumed(pets, tmp_path / "again", config, model=model)
    assert_identical(contents(tmp_path / "again"), contents(tmp_path / "run"))


def test_a_run_whose_images_are_gone_ends(pets: Dataset, tmp_path: Path) -> None:
    model, config = dataclasses.replace(MODEL, num_classes=2), dataclasses.replace(OF_PETS, skip_bad_images=True)
    with pytest.raises(TrainingError, match=r"too few images can be read for 2 updates .* in a row") as caught:
        train(pets, tmp_path / "run", config, model=model, before=lambda _: damage(pets.train, range(30)))
    assert caught.value.options == ("resume",)
    assert load_checkpoint(tmp_path / "run" / "last.pt").progress["step"] == 0


@pytest.mark.parametrize(
    ("images", "size", "told", "better"),
    [
        (44, 24, "each epoch leaves out 20 of 44 training images, others every time, because they fill no batch", 22),
        (40, 35, "each epoch leaves out 5 of 40", None),  # an eighth
        (47, 25, "each epoch leaves out 22 of 47", 23),  # twice 23 leave out 1, less than a sixteenth
        (44, 22, "", None),
    ],
)
def test_many_images_that_fill_no_batch_are_pointed_out(
    digits: Dataset, tmp_path: Path, images: int, size: int, told: str, better: int | None
) -> None:
    config = dataclasses.replace(STANDARD, batch_size=size, limit_train=images)
    observer = Observer()
    with RunFolder(tmp_path / "run") as folder:
        Trainer(MODEL, config, digits, folder, device=torch.device("cpu"), observer=observer)
    found = [advice for text, advice in zip(observer.warnings, observer.advice, strict=True) if "leaves out" in text]
    assert found == ([] if better is None else [{"batch_size": better}])
    assert better is None or any(text.startswith(told) for text in observer.warnings)


def test_too_few_images_for_a_batch_are_refused_before_anything_is_written(digits: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, batch_size=190, limit_train=None)
    with pytest.raises(ConfigError, match="180 training images do not fill one batch of 190; use a smaller batch size"):
        train(digits, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_every_attack_of_a_run_starts_from_noise_of_its_own(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def spy(images: Tensor, config: AttackConfig, generator: torch.Generator, place: Any = None) -> Tensor:
        seeds.append(generator.initial_seed())
        return starting_point(images, config, generator, place)

    monkeypatch.setattr(steps, "starting_point", spy)
    assert train(digits, tmp_path / "run")
    assert len(set(seeds)) == len(seeds) == 2 * 4  # two levels, four steps


@pytest.mark.parametrize("flip", [True, False])
def test_training_images_are_shuffled_cropped_and_mirrored(
    digits: Any, loaders: list[dict[str, Any]], flip: bool
) -> None:
    config = dataclasses.replace(TRAIN, flip=flip)
    streams.Streams(split_dataset(digits, config), MODEL, config, periods=(1, 1), device=torch.device("cpu"))
    crop = CropFlip(padding=4, flip=flip)  # an eighth of 32
    assert [(each["shuffle"], each["stream"], each["augment"]) for each in loaders] == [
        (True, 0, crop),
        (True, 1, crop),
    ]


def test_routers_follow_the_schedule_from_their_own_peak(digits: Any, tmp_path: Path) -> None:
    class Witness(Observer):
        def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
            assert self.trainer is not None
            for level in self.trainer.levels:
                rates.setdefault(level.name, []).append(level.optimizer.param_groups[0]["lr"])

    rates: dict[str, list[float]] = {}
    train(digits, tmp_path / "run", dataclasses.replace(TRAIN, router_lr=0.7), observer=Witness())
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates["routers"] == pytest.approx([0.7 * share for share in cosine])
    assert rates["experts"] == pytest.approx([0.1 * share for share in cosine])


def test_the_moving_average_is_what_is_validated(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observer, seen, evaluate = Observer(), [], loop.evaluate

    def spy(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        seen.append(model is observer.trainer.average.network)  # type: ignore[union-attr]
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(loop, "evaluate", spy)
    train(digits, tmp_path / "run", dataclasses.replace(STANDARD, ema=0.9), observer=observer)
    assert seen == [True, True]


def test_the_figures_of_an_epoch() -> None:
    def result(
        loss: float, clean: list[list[int]], attacked: list[list[int]], right: int, robust: int, taken: bool = True
    ) -> StepResult:
        routings = (Routing(torch.tensor(experts), None) for experts in (clean, attacked))
        return StepResult(
            torch.tensor(loss),
            torch.arange(len(clean)),
            torch.tensor(right),
            torch.tensor(robust),
            *routings,
            torch.tensor(taken),
        )

    sums = EpochSums(routed=True, device=torch.device("cpu"))
    sums.add(result(2.0, [[0, 0], [0, 1], [1, 1]], [[0, 0], [1, 1], [0, 0]], 3, 1))
    sums.add(result(6.0, [[0, 0]], [[0, 0]], 0, 0))
    sums.add(result(9.0, [[0, 0]], [[1, 1]], 1, 1, taken=False))
    # the loss is (3 * 2 + 6) / 4; of four images three are right, one under attack, and two change a decision
    assert sums.summary() == {"loss": 3.0, "sa": 75.0, "ra": 25.0, "routers_fooled": 50.0}


def test_a_run_hands_on_how_experts_start(
    digits: Any, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "start_from", lambda model, initial, **options: asked.append(options))
    config = dataclasses.replace(TRAIN, init="0" * 64, upcycling="windows", reinitialize=0.5, seed=3)
    with RunFolder(tmp_path / "run") as folder:
        loop.Trainer(
            MODEL,
            config,
            digits,
            folder,
            device=torch.device("cpu"),
            observer=Observer(),
            initial=load_checkpoint(whole_run / "best.pt"),
        )
    assert asked == [{"upcycling": "windows", "reinitialize": 0.5, "seed": 3}]
