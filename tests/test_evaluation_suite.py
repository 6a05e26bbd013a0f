"""The evaluation suite: meaning of its figures, resumption, and refused inputs."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rooms import TwoRooms, room_images
from torch import Tensor, nn

from advmoe.attacks import pathways
from advmoe.attacks.autoattack import STANDARD as AUTOATTACKS
from advmoe.attacks.autoattack import AutoAttackResult
from advmoe.attacks.pathways import route_attack
from advmoe.attacks.pgd import Forward
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import ImageSet
from advmoe.errors import AdvMoEError, CheckpointError, ConfigError
from advmoe.evaluation.accuracy import evaluate
from advmoe.evaluation.card import figures, percent
from advmoe.evaluation.controls import calibration_batches, controlled
from advmoe.evaluation.dissection import dissection, route_log
from advmoe.evaluation.examples import load_examples
from advmoe.evaluation.machine import Machine, in_words
from advmoe.evaluation.paired import outcomes
from advmoe.evaluation.results import FURTHER, PGD, ROUTE, WORST, SuiteConfig, SuiteResult, planned
from advmoe.evaluation.stages import begin, stages
from advmoe.evaluation.state import EvaluationState
from advmoe.evaluation.suite import common_pathways, identity, run_suite
from advmoe.evaluation.vocabulary import Attack
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

ATTACK = AttackConfig(eps=8 / 255, steps=10, step_size=2 / 255)
ROUTING = SuiteConfig(attack=ATTACK, diagnosed=0)


def rooms(*reds: float, labels: list[int] | None = None) -> ImageSet:
    """Images for the two rooms: red (in levels) decides which, green says class 0, so the labels are 0 by default."""
    images = (255 * room_images(*(red / 255 for red in reds))).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    chosen = np.array(labels or [0] * len(reds), dtype=np.int64)
    return ImageSet(images=images, labels=chosen, class_names=("zero", "one"))


@pytest.fixture(scope="module")
def result() -> SuiteResult:
    """Red 124 is 4 levels below the threshold of 127.5, red 110 is out of reach, 140 is in the trap and wrong."""
    return run_suite(TwoRooms(), rooms(124, 110, 110, 140), ROUTING)


def test_each_attack_says_what_it_can_and_cannot_break(result: SuiteResult) -> None:
    numbers = figures(result)
    assert numbers["sa"] == 75.0  # the image in the trap is wrong
    assert numbers["ra_pgd10"] == 75.0  # the model's own gradient does not see the router
    assert numbers["ra_views"] == {
        "detached": 75.0,
        "straight_through": 75.0,
        "advantage": 50.0,
        "softmax": 50.0,
        "mixture@1": 50.0,
        "mixture@10": 50.0,
    }
    assert numbers["ra_union"] == numbers["ra_route"] == numbers["ra_worst"] == 50.0
    assert numbers["routes_exact"] is True
    assert numbers["ra_experts"] == 75.0  # with the routing frozen nothing is weak
    assert numbers["ra_routers"] == 50.0
    assert numbers["every_pathway"] == 0.0  # expert 1 says class 1 to everything
    assert numbers["pathways"] == 2
    # Of 1, 2, 4, 8 levels (and a half) 124 flips at 4; the trap is 12 levels from the threshold and
    # does not flip.
    assert numbers["routers_flipped_within"] == {"4/255": 25.0}


@pytest.mark.parametrize(
    ("seen", "robust"),
    [
        # A view that is right everywhere drives red over the threshold, where the model is wrong.
        (lambda red: torch.stack((1 + 0 * red, red / 2), dim=1), [False, True]),
        # A view that is wrong everywhere does not end the attack at the start, where the model is right.
        (lambda red: torch.stack((0 * red, 1 + red), dim=1), [False, True]),
    ],
)
def test_the_model_itself_judges_what_a_view_has_found(
    seen: Callable[[Tensor], Tensor], robust: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def view(images: Tensor, rows: Tensor) -> Tensor:
        return seen(images[:, 0].mean(dim=(1, 2)))

    monkeypatch.setattr("advmoe.evaluation.stages.routing_views", lambda *_: {"softmax": view})
    victims = Victims.of(TwoRooms(), next(BatchLoader(rooms(124, 110), batch_size=2).epoch(0)), ATTACK, seed=0)
    with evaluating(victims.model):
        run = begin(victims, ROUTING)
        (stage,) = (each for each in stages(run, torch.tensor([[0]])) if each.gives == "robust/view/softmax")
        stage.work()
    assert run.arrays[stage.gives].tolist() == robust
    assert (victims.model(run.worst).argmax(dim=1) == 0).tolist() == robust


def test_the_worst_case_holds_on_the_model_and_its_pathways_are_logged(result: SuiteResult) -> None:
    assert result.arrays["prediction/clean"].tolist() == [0, 0, 0, 1]
    assert result.arrays["prediction/worst"].tolist() == [1, 0, 0, 1]
    log = route_log(result, TwoRooms())
    assert [name for name, _ in log.conditions] == ["clean", "pgd", "worst"]
    assert log.routes("worst").experts_IL[:, 0].tolist() == [1, 0, 0, 1]
    parts = dissection(log, "worst")
    # Image 0: router and prediction fooled; 1 and 2: neither; 3 was wrong from the start, in the
    # room it stays in.
    assert parts["router_fooled_wrong"] == 25.0
    assert parts["router_survives_right"] == 50.0
    assert parts["router_survives_wrong"] == 25.0
    assert (parts["router_robustness"], parts["moe_robustness"]) == (75.0, 50.0)


def test_the_routers_are_judged_by_images_that_were_all_attacked(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    torch.manual_seed(0)
    model = tiny_vgg().eval()
    noise = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        labels = model(torch.from_numpy(noise).permute(0, 3, 1, 2) / 255).argmax(dim=1).numpy()
    labels[:8] = (labels[:8] + 1) % 10  # wrong when clean: nothing to break, but routers to fool
    images = ImageSet(images=noise, labels=labels, class_names=tuple("0123456789"))
    attack = AttackConfig(eps=64 / 255, steps=5, step_size=16 / 255)
    result = run_suite(model, images, SuiteConfig(attack=attack, diagnosed=0, routing=False))
    for condition in ("pgd", "worst"):
        changed = (result.arrays["pathway/clean"] != result.arrays[f"pathway/{condition}"]).any(axis=1)
        assert changed[:8].any(), condition
    assert dissection(route_log(result, model), "worst")["moe_robustness"] == 100 * result.ra(WORST)


def test_diagnostics_look_at_what_all_attacks_left(result: SuiteResult) -> None:
    views = ["advantage", "mixture@1", "mixture@10", "softmax", "straight_through"]
    assert sorted(result.white_box) == [PGD, ROUTE, *(Attack("view", name) for name in views)]
    reds = (124, *[110] * 15, 140)
    checked = run_suite(TwoRooms(), rooms(*reds), dataclasses.replace(ROUTING, diagnosed=17))
    found = {check.name: check for check in checked.diagnostics}
    # Square breaks the image that PGD cannot (see test_diagnostics), but the attacks on the routing
    # had it already.
    assert found["black_box"].status == "passed"
    assert found["hidden_by_routing"].status == "passed"  # one image of 17
    assert found["routing"].value.startswith("2 pathways in 17 images; entropy of the load 0.32")  # of (16/17, 1/17)
    few = run_suite(TwoRooms(), rooms(124, 110, 110, 140), dataclasses.replace(ROUTING, diagnosed=4)).diagnostics
    assert {check.name: check.status for check in few}["hidden_by_routing"] == "not run"


def test_what_routing_hides_is_looked_for_even_if_it_is_not_attacked() -> None:
    config = SuiteConfig(attack=ATTACK, routing=False, diagnosed=17)
    for near, status in (([124, 110], "passed"), ([124, 123], "failed")):  # one may differ, not two
        reds = (*near, *[110] * 14, 140)
        checks = {check.name: check for check in run_suite(TwoRooms(), rooms(*reds), config).diagnostics}
        assert checks["hidden_by_routing"].status == status
    assert checks["hidden_by_routing"].value.startswith("RA 94.1 % by the model's own gradient, 82.4 %")


def test_with_autoattack_its_own_square_is_judged(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    pytest.importorskip("pyautoattack", reason="AutoAttack is an optional dependency")
    model = tiny_vgg(kind="s_dense", model_scale=1.0).eval()
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        labels = model(torch.from_numpy(noise).permute(0, 3, 1, 2) / 255).argmax(dim=1).numpy()
    images = ImageSet(images=noise, labels=labels, class_names=tuple("0123456789"))
    attack = AttackConfig(eps=16 / 255, steps=2, step_size=8 / 255)
    result = run_suite(model, images, SuiteConfig(attack=attack, diagnosed=2, autoattack=True))
    (black_box,) = [check for check in result.diagnostics if check.name == "black_box"]
    assert black_box.value == "0.0 % of 16 images broken by 5000 queries of Square alone"


def test_without_routing_the_suite_is_sa_and_ra(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = tiny_vgg(kind="s_dense", model_scale=1.0).eval()
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    images = ImageSet(images=noise, labels=np.arange(12) % 10, class_names=tuple("0123456789"))
    attack = AttackConfig(eps=1 / 255, steps=2, step_size=1 / 255)
    plain = evaluate(model, images, attack, batch_size=5)
    config = SuiteConfig(attack=attack, routing=False, diagnosed=0, eps_sweep=(0.0, 4 / 255))
    result = run_suite(model, images, config, batch_size=5)
    assert (result.sa, result.ra(PGD)) == (plain.sa, plain.ra)
    assert result.attacks == (PGD, Attack("eps", "0"), Attack("eps", "0.0156863"), WORST)
    assert result.ra(Attack("eps", "0")) == result.sa
    assert result.ra(Attack("eps", "0.0156863")) <= result.ra(PGD)


class Lock(torch.nn.Module):
    """Says class 0, and class 1 if five pixels of the red channel are brighter than in the images of
    `locked`. Its gradient is zero, so PGD stays at its start, and one uniform start in 32 opens it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        opened = (x[:, 0, 0, :5] > 128.1 / 255).all(dim=1).float()
        return torch.stack((torch.full_like(opened, 0.5), opened), dim=1)


def locked(number: int) -> ImageSet:
    gray = np.full((number, 8, 8, 3), 128, np.uint8)
    return ImageSet(images=gray, labels=np.zeros(number, np.int64), class_names=("zero", "one"))


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_model_without_routing_gets_as_many_starts_as_a_routed_one_gets_attempts(
    monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    made = {"starts": 0, "targets": 0}
    pgd, steer = untargeted.__globals__["pgd"], pathways.steer

    def counted_pgd(forward: Forward, images: torch.Tensor, *arguments: Any, **further: Any) -> torch.Tensor:
        made["starts"] += len(images)
        return pgd(forward, images, *arguments, **further)  # type: ignore[no-any-return]

    def counted_steer(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made["targets"] += 1
        return steer(*arguments)

    monkeypatch.setitem(untargeted.__globals__, "pgd", counted_pgd)
    monkeypatch.setattr(pathways, "steer", counted_steer)
    config = SuiteConfig(attack=dataclasses.replace(ATTACK, restarts=restarts), diagnosed=0)
    found = {}
    for model, images in ((TwoRooms(), rooms(110)), (torch.nn.Sequential(TwoRooms()), rooms(110))):
        made.update(starts=0, targets=0)
        (batch,) = BatchLoader(images, batch_size=1).epoch(0)
        run = begin(Victims.of(model, batch, config.attack, seed=0), config)
        behind_ra = [
            attack.column for attack in planned(config, model) if attack.family in ("view", "route", "further")
        ]
        with evaluating(model):
            for stage in stages(run, common_pathways(model, images, 1, torch.device("cpu"))[0]):
                if stage.gives in ("pathway/pgd", *behind_ra):
                    stage.work()
        assert not run.broken.any()
        found[type(model).__name__] = dict(made)
    assert found["TwoRooms"] == {"starts": 6 * restarts, "targets": 8}
    assert found["Sequential"] == {"starts": 6 * restarts + 8, "targets": 0}


def test_an_image_that_only_a_further_start_breaks_is_broken(tmp_path: Path) -> None:
    images, config = locked(24), SuiteConfig(attack=ATTACK, diagnosed=0)
    (batch,) = BatchLoader(images, batch_size=24).epoch(0)
    victims = Victims.of(Lock(), batch, ATTACK, seed=0)
    kept = torch.stack([victims.right(victims.starts([start])) for start in range(14)]).numpy()
    result = run_suite(Lock(), images, config)
    assert result.attacks == (PGD, FURTHER, WORST)
    np.testing.assert_array_equal(result.robust([PGD]), kept[0])
    np.testing.assert_array_equal(result.robust(result.table), kept.all(axis=0))
    np.testing.assert_array_equal(result.robust([WORST]), kept.all(axis=0))
    assert 0 < kept.all(axis=0).sum() < kept[0].sum()
    np.testing.assert_array_equal(result.arrays["prediction/worst"] == 0, kept.all(axis=0))
    numbers = figures(result)
    assert (numbers["further_starts"], numbers["ra_pgd10"]) == (13, percent(float(kept[0].mean())))
    assert numbers["ra"] == numbers["ra_further_starts"] == numbers["ra_worst"] == percent(float(kept.all(0).mean()))

    def interrupted(done: float, total: int, what: str) -> None:
        if done > 5 and what == "PGD, further starts":  # of the second batch
            raise KeyboardInterrupt

    path = tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        run_suite(Lock(), images, config, batch_size=5, state_path=path, progress=interrupted)
    for other in (
        run_suite(Lock(), images, config, batch_size=5, state_path=path),
        run_suite(Lock(), images, config, batch_size=1),
    ):
        for name, array in result.arrays.items():
            np.testing.assert_array_equal(other.arrays[name], array, err_msg=name)
    outside = run_suite(Lock(), images.take(np.array([3, 9])), config, numbers=np.array([3, 9]))
    np.testing.assert_array_equal(outside.robust([FURTHER]), result.robust([FURTHER])[[3, 9]])


def test_further_starts_differ_where_the_first_attack_starts_at_the_clean_image() -> None:
    attack = dataclasses.replace(ATTACK, start="clean")
    result = run_suite(Lock(), locked(24), SuiteConfig(attack=attack, diagnosed=0))
    assert result.ra(PGD) == 1.0
    assert result.ra(FURTHER) < 1.0


def test_an_interrupted_evaluation_goes_on_with_the_attack_that_was_interrupted(tmp_path: Path) -> None:
    model, images, path = TwoRooms(), rooms(124, 110, 123, 140, 110), tmp_path / "state.npz"
    whole = run_suite(model, images, ROUTING, batch_size=2)
    seen: list[tuple[float, str]] = []

    def interrupted(done: float, total: int, what: str) -> None:
        if done > 2 and what == "route attack":  # of the second batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(model, images, ROUTING, batch_size=2, state_path=path, progress=interrupted)
    assert sorted(name.name for name in tmp_path.iterdir()) == ["state-batch.npz", "state.npz"]

    def watched(done: float, total: int, what: str) -> None:
        seen.append((done, what))

    resumed = run_suite(model, images, ROUTING, batch_size=2, state_path=path, progress=watched)
    assert [what for done, what in seen if done < 4] == [
        "",
        "route attack",
        "experts alone",
        "routers alone",
        "every pathway",
    ]
    assert resumed.arrays.keys() == whole.arrays.keys()
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array)
    assert [name.name for name in tmp_path.iterdir()] == ["state.npz"]
    seen.clear()
    run_suite(model, images, ROUTING, batch_size=2, state_path=path, progress=watched)
    assert {done for done, _ in seen} == {5}


def test_an_evaluation_says_which_machines_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, path = rooms(124, 110, 123), tmp_path / "state.npz"

    def evaluated_on(device: str, stop: str | None = None) -> list[str]:
        def interrupted(done: float, total: int, what: str) -> None:
            if what == stop and done > 2:  # of the second batch
                raise KeyboardInterrupt

        here = Machine(device=device, versions={"torch": f"{len(device)}"})
        monkeypatch.setattr("advmoe.evaluation.suite.this_machine", lambda _: here)
        result = run_suite(TwoRooms(), images, ROUTING, batch_size=2, state_path=path, progress=interrupted)
        return [machine["device"] for machine in result.machines]

    with pytest.raises(KeyboardInterrupt):
        evaluated_on("laptop", stop="route attack")
    assert evaluated_on("cluster") == ["laptop", "cluster"]
    assert evaluated_on("desktop") == ["laptop", "cluster"]  # nothing was left to attack
    both = [
        Machine(device=name, versions={"torch": "2", "python": python}) for name, python in zip("ab", "34", strict=True)
    ]
    assert in_words(both) == {"device": "a; b", "versions": {"torch": "2", "python": "3, 4"}}


@pytest.mark.parametrize("size", [1, 3, 9])
def test_an_interrupted_evaluation_goes_on_with_another_batch_size(size: int, tmp_path: Path) -> None:
    model, images, path = TwoRooms(), rooms(124, 110, 123, 140, 110, 126, 124), tmp_path / "state.npz"
    whole = run_suite(model, images, ROUTING, batch_size=2)
    seen: list[tuple[float, str]] = []

    def interrupted(done: float, total: int, what: str) -> None:
        if done > 2 and what == "route attack":  # of the second batch
            raise KeyboardInterrupt

    def watched(done: float, total: int, what: str) -> None:
        seen.append((done, what))

    with pytest.raises(KeyboardInterrupt):
        run_suite(model, images, ROUTING, batch_size=2, state_path=path, progress=interrupted)
    resumed = run_suite(model, images, ROUTING, batch_size=size, state_path=path, progress=watched)
    batches = [done for done, what in seen if what == "PGD"]
    assert batches == list(range(2, 7, size))  # the two images of the finished batch are not attacked again
    assert resumed.arrays.keys() == whole.arrays.keys()
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array, err_msg=name)
    assert [name.name for name in tmp_path.iterdir()] == ["state.npz"]


def test_a_state_that_names_its_batch_size_is_of_an_earlier_version_and_goes_on(tmp_path: Path) -> None:
    EvaluationState(tmp_path / "state.npz", {"seed": 0, "batch size": 256}).add({"right": np.array([True])})
    assert EvaluationState(tmp_path / "state.npz", {"seed": 0}).images_done == 1


def test_a_state_whose_attacks_were_others_is_refused_in_one_line(tmp_path: Path) -> None:
    EvaluationState(tmp_path / "state.npz", {"layout": 5, "seed": 0}).add({"right": np.array([True])})
    with pytest.raises(CheckpointError, match=r"another version of this program wrote it; move it away to start anew$"):
        EvaluationState(tmp_path / "state.npz", {"layout": 6, "seed": 0, "form": "a", "logits": [[1.0]]})


def test_a_choice_of_images_is_attacked_as_in_the_whole_set(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    torch.manual_seed(0)
    model = tiny_vgg(kind="s_dense", model_scale=1.0).eval()
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    images = ImageSet(images=noise, labels=np.arange(12) % 10, class_names=tuple("0123456789"))
    numbers = np.array([2, 7, 11])
    (whole,), (few,) = (BatchLoader(each, batch_size=12).epoch(0) for each in (images, images.take(numbers)))
    chosen = Victims.of(model, few, ATTACK, seed=0, numbers=numbers)
    assert torch.equal(chosen.starts(), Victims.of(model, whole, ATTACK, seed=0).starts()[numbers])
    result = run_suite(model, images.take(numbers), SuiteConfig(attack=ATTACK, diagnosed=0), numbers=numbers)
    assert result.arrays["index"].tolist() == [2, 7, 11]


def test_a_state_of_another_evaluation_is_refused_with_the_reason(tmp_path: Path) -> None:
    images, path = rooms(124, 110), tmp_path / "state.npz"
    run_suite(TwoRooms(), images, ROUTING, state_path=path)
    other = TwoRooms()
    torch.nn.init.ones_(other.conv.weight)
    with pytest.raises(CheckpointError, match="belongs to another evaluation: it is of other weights: another check"):
        run_suite(other, images, ROUTING, state_path=path)
    with pytest.raises(CheckpointError, match="seed was 0, now it is 1"):
        run_suite(TwoRooms(), images, ROUTING, state_path=path, seed=1)
    with pytest.raises(CheckpointError, match="it is of other images; repeat"):
        run_suite(TwoRooms(), rooms(124, 111), ROUTING, state_path=path)
    with pytest.raises(CheckpointError, match="it is of other images; repeat"):
        run_suite(TwoRooms(), images, ROUTING, state_path=path, numbers=np.array([0, 2]))
    with pytest.raises(CheckpointError, match=r"it is of other images \(2, now 3\); repeat") as caught:
        run_suite(TwoRooms(), rooms(124, 111, 112), ROUTING, state_path=path)
    assert caught.value.options == ("dataset", "limit_eval", "skip_bad_images")
    with np.load(path) as stored:
        arrays = dict(stored)
    for changed in (
        {"right": np.array(["yes", "no"])},
        {"right": arrays["right"][:1]},
        {"right": np.array(True)},
        {"machines": np.array("3")},
        {"machines": np.array('[{"device": "a"}]')},
    ):
        np.savez(path, **(arrays | changed))
        with pytest.raises(CheckpointError, match="damaged; move it away"):
            run_suite(TwoRooms(), images, ROUTING, state_path=path)
    path.write_bytes(b"PK broken")
    with pytest.raises(CheckpointError, match="damaged; move it away"):
        run_suite(TwoRooms(), images, ROUTING, state_path=path)


class Scaled(nn.Module):
    """The logits of another model times a factor that is no part of its weights, of images rounded to some levels."""

    def __init__(self, inner: nn.Module, factor: float, levels: float = 1e6) -> None:
        super().__init__()
        self.inner, self.factor, self.levels = inner, factor, levels

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner((self.levels * images).round() / self.levels)
        return logits * self.factor


def test_a_state_of_a_model_with_the_same_weights_that_computes_something_else_is_refused(
    tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path
) -> None:
    images, path, config = rooms(124, 110), tmp_path / "state.npz", SuiteConfig(attack=ATTACK, diagnosed=0)
    first = run_suite(Scaled(TwoRooms(), 1.0), images, config, state_path=path)
    inverted, coarse, elsewhere = (Scaled(TwoRooms(), 1.0) for _ in range(3))
    inverted.register_forward_hook(lambda module, images, logits: -logits)
    coarse.register_forward_pre_hook(lambda module, images: ((5 * images[0]).round() / 5,))
    for other in (inverted, coarse):
        with pytest.raises(CheckpointError, match="it is of a model with these weights that computes something else;"):
            run_suite(other, images, config, state_path=path)
    with pytest.raises(CheckpointError, match="it is of other weights"):  # the names differ
        run_suite(TwoRooms(), images, config, state_path=path)
    for other in (Scaled(TwoRooms(), 1.0 + 1e-4), Scaled(TwoRooms(), 1.0, levels=2e6)):  # within a machine's rounding
        with pytest.raises(CheckpointError, match="it is of another kind of network, or of one with other numbers"):
            run_suite(other, images, config, state_path=path)
    elsewhere.register_forward_hook(lambda module, images, logits: logits * (1.0 + 1e-5))  # another machine's rounding
    nearly = run_suite(elsewhere, images, config, state_path=path)
    np.testing.assert_array_equal(nearly.robust([WORST]), first.robust([WORST]))
    learned, scaled = (tiny_vgg(seed=3, router_gradient=kind) for kind in ("dense", "value"))
    scaled.load_state_dict(learned.state_dict())
    few = ImageSet(images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.zeros(2, np.int64), class_names=tuple("abc"))
    forms = [identity(model, few, config, 0)["form"] for model in (learned, scaled)]
    assert forms[0] != forms[1]


class Counting(nn.Module):
    """Counts its passes, and notes that it has made one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.passes, self.ready = TwoRooms(), 0, False

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        self.ready = True
        logits: Tensor = self.inner(images)
        return logits


def test_a_model_that_counts_is_the_same_after_any_number_of_passes(tmp_path: Path) -> None:
    images, config, model = rooms(124, 110), SuiteConfig(attack=ATTACK, routing=False, diagnosed=0), Counting()
    for each in (model, model, Counting()):
        assert run_suite(each, images, config, state_path=tmp_path / "state.npz").sa == 1.0


class Noisy(nn.Module):
    """Says class 0, by another margin each time."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack((1 + torch.rand(len(images)), images.mean(dim=(1, 2, 3))), dim=1)


def test_a_random_model_is_recognized_by_its_weights_alone(tmp_path: Path) -> None:
    images, config = rooms(124, 110), SuiteConfig(attack=ATTACK, routing=False, diagnosed=0)
    for _ in range(2):
        assert run_suite(Noisy(), images, config, state_path=tmp_path / "state.npz").sa == 1.0


@pytest.mark.parametrize(
    "changed",
    [
        {"clean": np.zeros((3, 4, 4, 3), np.uint8)},
        {"attacked": np.zeros((2, 4, 4, 3))},
        {"difference": np.zeros((2, 16), np.float32)},
        {"label": np.array([0, 2])},
        {"after": np.array(["cat", "dog"])},
        {"class_names": np.array([1, 2])},
        {"more": np.zeros(2)},
    ],
)
def test_a_file_that_holds_something_else_shows_no_images(changed: dict[str, Any], tmp_path: Path) -> None:
    pixels, numbers = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    arrays = {"clean": pixels, "attacked": pixels, "difference": pixels.astype(np.float32)}
    arrays |= {"label": numbers, "before": numbers, "after": numbers, "class_names": np.array(["cat", "dog"])}
    path = tmp_path / "examples.npz"
    np.savez(path, **arrays)
    assert load_examples(path).keys() == arrays.keys()
    np.savez(path, **(arrays | changed))
    assert load_examples(path) == {}


@pytest.mark.parametrize(
    ("was", "now", "message", "options"),
    [
        ({"steps": 50}, {"steps": 20}, "steps was 50, now it is 20", ("steps",)),
        ({"eps": 8 / 255}, {"eps": 4 / 255}, "eps was 8/255, now it is 4/255", ("eps",)),
        ({"eps": 0.0313725}, {"eps": 8 / 255}, "eps was 0.0313725, now it is 0.03137254901960784", ("eps",)),
        (
            {"eps_sweep": [2 / 255, 1 / 255]},
            {"eps_sweep": []},
            "eps_sweep was 2/255,1/255, now it is none",
            ("eps_sweep", "suite"),
        ),
        (
            {"eps_sweep": [n / 255 for n in range(30)]},
            {"eps_sweep": [n / 255 for n in range(31)]},
            "eps_sweep was ...55,26/255,27/255,28/255,29/255, now it is ...55,26/255,27/255,28/255,29/255,30/255",
            ("eps_sweep", "suite"),
        ),
        ({"routing": True}, {"routing": False}, "routing was true, now it is false", ("routing", "suite")),
        ({}, {"pathways": 8}, "pathways was null, now it is 8", ("pathways",)),
        (
            {"route": "x" * 100 + "a" + "y" * 100},
            {"route": "x" * 100 + "b" + "y" * 100},
            f"route was ...{'x' * 30}a{'y' * 29}..., now it is ...{'x' * 30}b{'y' * 29}...",
            ("route",),
        ),
    ],
)
def test_a_refused_state_says_what_differs(
    was: dict[str, Any], now: dict[str, Any], message: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    common = {"start": "uniform" * 20}  # so long that only a part of it would be shown
    EvaluationState(tmp_path / "state.npz", {"attack": common | was}).add({"right": np.array([True])})
    with pytest.raises(CheckpointError, match=re.escape(f"belongs to another evaluation: {message}; repeat")) as caught:
        EvaluationState(tmp_path / "state.npz", {"attack": common | now})
    assert caught.value.options == options


def test_nan_models_and_half_precision_are_refused(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = TwoRooms()
    torch.nn.init.constant_(model.routers[0].linear.weight, torch.nan)
    with pytest.raises(AdvMoEError, match="logits of the routers are not finite"):
        run_suite(model, rooms(124, 110), ROUTING)
    with pytest.raises(ConfigError, match=r"measured in fp32, got parameters in torch\.bfloat16"):
        run_suite(TwoRooms().bfloat16(), rooms(124, 110), ROUTING)
    with pytest.raises(ConfigError, match="did you mean 8/255"):
        SuiteConfig(attack=ATTACK, eps_sweep=(8.0,))
    for twice in ((0.01, 0.01), (0.01, 0.0100000001), (0.5, 0.01, 0.01 + 1e-7)):  # the last: equal in a card
        with pytest.raises(ConfigError, match=r"the radii of a sweep must differ, got 2\.55/255 twice; leave"):
            SuiteConfig(attack=ATTACK, eps_sweep=twice)


def precisions() -> list[str]:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return [p.fp32_precision for p in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9")
@pytest.mark.parametrize("chosen", ["none", "tf32"])
def test_figures_and_controls_are_computed_without_tf32_whatever_was_chosen(chosen: str) -> None:
    matmul, inside = torch.backends.cuda.matmul, []
    found, matmul.fp32_precision = matmul.fp32_precision, chosen
    before = precisions()

    class Witness(TwoRooms):
        def run(self, x_BCHW: torch.Tensor, tape: RoutingTape) -> torch.Tensor:
            inside.append(precisions())
            return super().run(x_BCHW, tape)

    try:
        for work in (
            lambda: evaluate(Witness(), rooms(124, 110), ATTACK),
            lambda: calibration_batches(Witness(), rooms(124, 110), ATTACK, seed=0),
            lambda: controlled(Witness(), "inverted", 0, calibration=[room_images(0.4, 0.6)]),
        ):
            inside.clear()
            work()
            assert inside
            assert all(precision == ["ieee"] * 5 for precision in inside)
            assert precisions() == before
    finally:
        matmul.fp32_precision = found


def test_the_route_attack_looks_for_flips_where_pgd_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(victims: Victims, *, nearby: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(nearby - victims.images)
        return route_attack(victims, nearby=nearby, **rest)

    monkeypatch.setattr("advmoe.evaluation.stages.route_attack", watched)
    run_suite(TwoRooms(), rooms(110, 110), ROUTING)
    (moved,) = seen
    torch.testing.assert_close(moved[:, 1], torch.full_like(moved[:, 1], -8 / 255))


class Reshaping(nn.Module):
    """Reshapes as many networks do, which leaves the other dimension of an empty batch unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoRooms()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        flat = x_BCHW.reshape(len(x_BCHW), -1)
        logits: Tensor = self.inner(flat.view_as(x_BCHW))
        return logits


def test_a_batch_without_a_correct_image_gives_the_model_no_empty_batch() -> None:
    with pytest.raises(RuntimeError, match="reshape"):
        Reshaping()(torch.zeros(0, 3, 8, 8))
    result = run_suite(Reshaping(), rooms(110, 110, 140), ROUTING, batch_size=2)  # 140 is wrong when clean
    assert result.ra(WORST) == result.ra(PGD) == result.sa == pytest.approx(2 / 3)


class Rounding(nn.Module):
    """Says class 0 if red is above 1/2, by a little less in batches of an odd number of images. The
    difference stands for the rounding of kernels that are chosen by the size of the batch.
    """

    def forward(self, images: Tensor) -> Tensor:
        red_B = images[:, 0].mean(dim=(1, 2))
        return torch.stack((red_B, torch.full_like(red_B, 0.501 if len(images) % 2 else 0.5)), dim=1)


def test_a_success_of_pgd_counts_in_whatever_batch_it_was_seen() -> None:
    # Red 128 is 0.50196, and wrong after one step of 0.0025. So the next batch is odd. Red 129 is at
    # 0.50088 then, which is wrong in this batch, and the attack stops there. In a batch of four the
    # image would look right, though a third step would have taken it to 0.49838.
    attack = AttackConfig(eps=8 / 255, steps=3, step_size=0.0025, start="clean")
    result = run_suite(Rounding(), rooms(128, 129, 255, 255), SuiteConfig(attack=attack, routing=False, diagnosed=0))
    assert result.robust([PGD]).tolist() == result.robust([WORST]).tolist() == [False, False, True, True]


class Gray(nn.Module):
    """Says class 1 for images brighter than 1/2."""

    def forward(self, images: Tensor) -> Tensor:
        score_B = images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack((torch.zeros_like(score_B), score_B), dim=1)


def test_the_steps_of_a_sweep_are_in_proportion_to_the_radius() -> None:
    gray = ImageSet(np.full((1, 4, 4, 3), 134, np.uint8), np.ones(1, np.int64), ("dark", "light"))
    attack = AttackConfig(eps=8 / 255, steps=1, step_size=4 / 255, start="clean")
    result = run_suite(Gray(), gray, SuiteConfig(attack=attack, routing=False, diagnosed=0, eps_sweep=(16 / 255,)))
    assert [result.ra(each) for each in result.attacks[:2]] == [1.0, 0.0]


def test_autoattack_is_its_four_attacks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(victims: Victims, *, attacks: tuple[str, ...]) -> AutoAttackResult:
        (name,) = attacks
        return AutoAttackResult(victims.images, {name: victims.indices != AUTOATTACKS.index(name)})

    monkeypatch.setattr("advmoe.evaluation.stages.autoattack", fake)
    attack = AttackConfig(eps=0.0, steps=1)
    result = run_suite(Lock(), locked(6), SuiteConfig(attack=attack, routing=False, autoattack=True, diagnosed=0))
    numbers = figures(result)
    assert numbers["ra_aa_after"] == {"apgd-ce": 83.33, "apgd-t": 66.67, "fab-t": 50.0, "square": 33.33}
    assert numbers["ra_aa"] == 33.33
    assert outcomes(result)["ra_aa"].tolist() == [False] * 4 + [True] * 2


def test_experts_and_routers_are_attacked_on_each_images_own_pathway() -> None:
    # the first image is in the trap and wrong, so the second one is the first of the victims
    numbers = figures(run_suite(TwoRooms(), rooms(140, 110), ROUTING))
    assert numbers["ra_experts"] == numbers["ra_routers"] == 50.0


def test_statistics_of_controls_are_of_clean_and_attacked_images() -> None:
    clean, attacked = calibration_batches(TwoRooms(), rooms(110, 110), ATTACK, seed=0)
    torch.testing.assert_close((attacked - clean)[:, 1], torch.full_like(clean[:, 1], -8 / 255))
