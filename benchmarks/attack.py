"""Compare the speed of the attacks with other libraries: images per second of CPU time on one thread.

All libraries attack the same model. The runs alternate, and the result is the median. CPU time is
used because other work on the machine distorts wall time.

The model is a small untrained MoE-CNN on digits. Its own predictions are the labels, so all images
are correct. The radius is chosen so that PGD breaks about half of the images, as on a robust model.
Our attacks skip broken images and compute no gradients of parameters.

AutoAttack runs once in each library. To take less than a minute, it uses four classes (three
targets) and 300 queries of Square instead of 5,000. The two libraries alternate at every forward
pass, because the speed of a machine changes within seconds.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

import advmoe
from advmoe.attacks.autoattack import autoattack, package
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig
from advmoe.data.digits import load_digits
from advmoe.data.sets import ImageSet
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork

ROUNDS = 3
QUERIES = 300


def subject(num_images: int, num_classes: int, width: float) -> tuple[RoutedNetwork, Tensor, Tensor]:
    """The model, with BatchNorm statistics of the digits, some digits, and its predictions for them."""
    torch.manual_seed(0)
    digits = load_digits().train
    assert isinstance(digits, ImageSet)
    images = torch.from_numpy(digits.images[:256]).permute(0, 3, 1, 2).float().contiguous() / 255
    model = advmoe.create_model("vgg16", kind="moe", width=width, num_classes=num_classes)
    with torch.no_grad():
        for _ in range(10):
            model(images[:128])
    model.eval()
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    return model, images[:num_images], labels[:num_images]


def victims_of(model: nn.Module, images: Tensor, labels: Tensor, attack: AttackConfig) -> Victims:
    indices = torch.arange(len(images))
    return Victims(model=model, images=images, labels=labels, indices=indices, attack=attack, seed=0)


def halving_radius(model: RoutedNetwork, images: Tensor, labels: Tensor) -> float:
    """A radius at which PGD-10 leaves about half of the images."""
    low, high = 0.0, 0.25
    for _ in range(7):
        middle = (low + high) / 2
        attack = AttackConfig(eps=middle, steps=10, step_size=middle / 4)
        robust = untargeted(victims_of(model, images, labels, attack))[1].float().mean()
        low, high = (middle, high) if robust > 0.5 else (low, middle)
    return (low + high) / 2


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each run. The runs alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pgd_speed(num_images: int) -> dict[str, float]:
    import torchattacks

    model, images, labels = subject(num_images, 10, 0.125)
    with evaluating(model):
        eps = halving_radius(model, images, labels)
    attack = AttackConfig(eps=eps, steps=50, step_size=eps / 4)
    other = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=50)
    found: dict[str, float] = {}

    def ours() -> None:
        with evaluating(model):
            robust = untargeted(victims_of(model, images, labels, attack))[1]
        found["ra_ours"] = float(robust.float().mean())

    def theirs() -> None:
        adversarial = other(images, labels)
        with torch.no_grad():
            found["ra_torchattacks"] = float((model(adversarial).argmax(dim=1) == labels).float().mean())

    seconds = interleaved({"ours": ours, "torchattacks": theirs}, ROUNDS)
    return found | {
        "pgd50_images_per_second": num_images / seconds["ours"],
        "torchattacks_pgd50_images_per_second": num_images / seconds["torchattacks"],
        "pgd50_vs_torchattacks": seconds["torchattacks"] / seconds["ours"],
    }


Turn = Callable[[], None]


def in_turns(runs: dict[str, Callable[[Turn], Any]]) -> dict[str, float]:
    """CPU seconds of each run. Each run has a thread. One thread works at a time, until it calls its `turn`."""
    may_go = {name: threading.Semaphore(0) for name in runs}
    waiting = list(runs)
    seconds: dict[str, float] = {}

    def next_one() -> None:
        if waiting:
            may_go[waiting[0]].release()

    def work(name: str) -> None:
        def turn() -> None:
            waiting.append(name)
            next_one()
            may_go[name].acquire()
            waiting.pop(0)

        may_go[name].acquire()
        waiting.pop(0)
        torch.set_num_threads(1)
        began = time.thread_time()
        try:
            runs[name](turn)
            seconds[name] = time.thread_time() - began
        finally:
            next_one()

    threads = [threading.Thread(target=work, args=(name,)) for name in runs]
    for thread in threads:
        thread.start()
    next_one()
    for thread in threads:
        thread.join()
    return seconds


class TakingTurns(nn.Module):
    """A model that waits for the turn of its run before each forward pass."""

    def __init__(self, model: nn.Module, turn: Turn) -> None:
        super().__init__()
        self.model, self.turn = model, turn

    def forward(self, images: Tensor) -> Tensor:
        self.turn()
        logits: Tensor = self.model(images)
        return logits


def autoattack_speed(num_images: int, *, smoke: bool) -> dict[str, float]:
    model, images, labels = subject(num_images, 4, 0.125)
    with evaluating(model):
        # PGD-10 is weak on this one. A huge radius breaks all images at once, so that the other
        # attacks have no work.
        eps = 0.5 if smoke else halving_radius(model, images, labels) / 2
    found: dict[str, float] = {}

    def ours(turn: Turn) -> None:
        subject = TakingTurns(copy.deepcopy(model), turn)
        with evaluating(subject):
            result = autoattack(victims_of(subject, images, labels, AttackConfig(eps=eps)), square_queries=QUERIES)
        found["ra_aa_ours"] = float(result.robust_after["square"].float().mean())

    def theirs(turn: Turn) -> None:
        subject = TakingTurns(copy.deepcopy(model), turn).eval()
        runner = package().AutoAttack(subject, norm="Linf", eps=eps, seed=0, version="standard")
        runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = 3
        runner.square.n_queries = QUERIES
        adversarial, _ = runner.run_standard_evaluation(images, labels, batch_size=num_images)
        with torch.no_grad():
            found["ra_aa_package"] = float((subject(adversarial).argmax(dim=1) == labels).float().mean())

    with contextlib.redirect_stderr(io.StringIO()):  # the package warns of zero gradients there
        seconds = in_turns({"ours": ours, "package": theirs})
    return found | {
        "autoattack_images_per_second": num_images / seconds["ours"],
        "package_autoattack_images_per_second": num_images / seconds["package"],
        "autoattack_vs_package": seconds["package"] / seconds["ours"],
    }


def convolution_share(num_images: int) -> float:
    """Share of PGD's time spent inside convolutions, forward and backward."""
    model, images, labels = subject(num_images, 10, 0.25)
    attack = AttackConfig(eps=1 / 255, steps=5, step_size=0.25 / 255)
    with evaluating(model), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        untargeted(victims_of(model, images, labels, attack))
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return float(sum(event.self_cpu_time_total for event in events if "conv" in event.key.lower()) / total)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--images", type=int, default=48, help="images for PGD")
    parser.add_argument("--autoattack-images", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        options.images, options.autoattack_images = 4, 2
    figures: dict[str, Any] = {}
    if options.smoke and importlib.util.find_spec("torchattacks") is None:
        print("torchattacks is not installed: PGD is not compared with it", file=sys.stderr)
    else:
        figures |= pgd_speed(options.images)
    figures |= autoattack_speed(options.autoattack_images, smoke=options.smoke)
    figures["convolution_share"] = convolution_share(options.images)
    figures = {name: round(value, 4) for name, value in figures.items()}
    figures |= harness.machine()
    harness.emit(figures, as_json=options.json)


if __name__ == "__main__":
    main()
