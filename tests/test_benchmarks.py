"""Every script in benchmarks/ runs in its smallest form and prints one JSON object."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import advmoe
from advmoe.attacks.pgd import forced, kl_objective, pgd, plain, starting_point
from advmoe.config import TrainConfig
from advmoe.data.loader import Batch
from advmoe.seeding import generator_for

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
    assert set(figures["held_out"]) == {"trained", "fitted", "constant"}
    assert set(figures["together"]) == {"trained", "fitted", "constant", "one_decision"}
    assert figures["oracle"]["loss"] < figures["probed_loss"]
    assert path.read_bytes() == before


def test_the_regret_of_uniform_decisions_is_one_and_of_the_best_zero() -> None:
    decided = runpy.run_path(str(SCRIPTS[0].parent / "router_probe.py"))["decided"]
    # One router, two experts, four images: the losses.
    exact = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 1.0], [3.0, 3.0]]).reshape(1, 4, 1, 2)
    assert decided(exact, exact.argmin(dim=3)) == {"wrong": 0.0, "regret": 0.0}
    # Expert 0 everywhere loses 3 on the third image. Uniform decisions lose .5 + .5 + 1.5.
    assert decided(exact, torch.zeros(1, 4, 1, dtype=torch.int64)) == {"wrong": 0.25, "regret": pytest.approx(1.2)}


def test_the_exact_losses_of_a_decision_are_those_of_forced_pathways() -> None:
    script = runpy.run_path(str(SCRIPTS[0].parent / "router_probe.py"))
    model = advmoe.create_model(
        "resnet18", num_classes=3, image_size=8, width=0.0625, num_experts=2, granularity="image"
    ).eval()
    batch = Batch(
        torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.arange(6),
    )
    config = TrainConfig(dataset="noise", method="advmoe")
    loss, attack = script["trades_of_each"], config.attack
    start = starting_point(batch.images, attack, generator_for(config.seed, 0))
    attacked = pgd(plain(model), batch.images, kl_objective(model(batch.images)), attack, start=start)
    of_one = script["exact_losses"](model, [batch.images, attacked], batch.labels, 6.0)
    probed = script["Probed"](model, batch, config)
    of_both = probed.of_both()
    own = [model(images) for images in (batch.images, attacked)]
    for expert in range(2):
        pathways = torch.full((6, len(model.router_of_layer)), expert)
        clean, moved = (model(images, pathways) for images in (batch.images, attacked))
        torch.testing.assert_close(of_one[0, :, 0, expert], loss(clean, own[1], batch.labels, 6.0))
        torch.testing.assert_close(of_one[1, :, 0, expert], loss(own[0], moved, batch.labels, 6.0))
        # Both versions change, and the attack is made anew against this expert.
        anew = pgd(forced(model, pathways), batch.images, kl_objective(clean), attack, start=start)
        expected = loss(clean, model(anew, pathways), batch.labels, 6.0)
        torch.testing.assert_close(of_both[0, :, 0, expert], expected)
    # One router: its oracle takes the better expert of each image, on the given attacked images.
    both = torch.stack([probed.loss(torch.full((6, len(model.router_of_layer)), e), attacked) for e in range(2)])
    assert probed.oracle(attacked)["loss"] == pytest.approx(float(both.amin(dim=0).mean()))
