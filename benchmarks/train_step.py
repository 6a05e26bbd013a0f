"""Measure one training step of each kind and method, in seconds of CPU time on one thread.

The steps alternate, and the result is the median. Short steps are taken three times in a round, and
long ones once. CPU time is used because other work on the machine distorts wall time. The routers
are calibrated before and hardly change (learning rate 1e-9), so every layer divides its images
among its experts; `busiest_expert` shows how evenly.

`reference` is AdvMoE as simple research code does it: all experts computed and masked,
straight-through gates, attacks that compute the gradients of the parameters too, images channel by
channel. It differs from `advmoe` in the gate only.

A step of routed images is taken once more before it is timed. oneDNN makes a convolution for each
new size of an expert's sub-batch and keeps it; a training of thousands of steps meets the same
sizes again.

Shape suffixes: B batch.
"""

from __future__ import annotations

from advmoe.host import prepare_process

prepare_process()  # before torch is there

import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import harness  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from harness.subjects import RATE, Step, busiest, images, step_of, subject  # noqa: E402
from torch import Tensor  # noqa: E402

from advmoe.config import ModelConfig  # noqa: E402
from advmoe.data.loader import Batch  # noqa: E402
from advmoe.models.moe_conv import MoEConv2d  # noqa: E402
from advmoe.models.network import RoutedNetwork  # noqa: E402
from advmoe.models.routing import Decision, RoutingTape  # noqa: E402
from advmoe.models.rows import expert_rows  # noqa: E402
from advmoe.training.losses import trades  # noqa: E402


def masked_forward(self: MoEConv2d, x: Tensor, decision: Decision) -> Tensor:
    """Every expert on every image, and a mask with the gate's gradient."""
    outputs = [F.conv2d(x, expert_rows(self.weight, rows), None, self.stride, self.padding) for rows in self.rows]
    mask = F.one_hot(decision.expert_index_B, len(outputs)).to(x.dtype)
    if decision.gate is not None:
        mask = mask * decision.gate[:, None]  # of a straight-through router
    return sum(mask[:, e, None, None, None] * y for e, y in enumerate(outputs))  # type: ignore[return-value]


def reference_step_of(model: RoutedNetwork, batches: list[Batch]) -> Step:
    """AdvMoE as simple research code does it."""
    routers, experts = list(model.router_parameters()), list(model.expert_parameters())
    optimizers = [torch.optim.SGD(part, lr=RATE, momentum=0.9, weight_decay=5e-4) for part in (routers, experts)]

    def run(pictures: Tensor) -> Tensor:
        saved, MoEConv2d.forward = MoEConv2d.forward, masked_forward  # type: ignore[assignment,method-assign]
        try:
            # not by `forward`, which makes the images channels-last
            tape = RoutingTape(model.routers, model.router_of_layer)
            return model.run((pictures - model.mean) / model.std, tape)
        finally:
            MoEConv2d.forward = saved  # type: ignore[method-assign]

    def update(level: int, batch: Batch) -> None:
        model.eval()
        clean = run(batch.images).detach().log_softmax(1)
        adversarial = (batch.images + 0.001 * torch.randn_like(batch.images)).clamp(0, 1)
        for _ in range(2):
            adversarial = adversarial.detach().requires_grad_()
            loss = F.kl_div(run(adversarial).log_softmax(1), clean, log_target=True, reduction="sum")
            model.zero_grad()
            loss.backward()  # the parameters' gradients are computed and thrown away
            assert adversarial.grad is not None
            moved = adversarial.detach() + 5 / 255 * adversarial.grad.sign()
            adversarial = torch.min(torch.max(moved, batch.images - 8 / 255), batch.images + 8 / 255).clamp(0, 1)
        model.train()
        loss = trades(run(batch.images), run(adversarial.detach()), batch.labels, 6.0)
        model.zero_grad()
        loss.backward()
        optimizers[level].step()

    def step(i: int) -> None:
        for level in range(2):
            update(level, batches[(2 * i + level) % len(batches)])

    return step


CHEAP = {"router_step": "reuse", "router_share": 0.5}
HALF = {"precision": "bf16_attack"}
USUAL = ["s_dense", "dense", "at_moe", "at_moe_n8", "advmoe_experts_step", "advmoe", "cheap", "reference"]
FURTHER = ["at_moe_n8_sampled", "s_dense_bf16", "dense_bf16", "at_moe_bf16", "advmoe_bf16"]
"""Steps that are measured on request only: routers that learn from one other expert, attacks in bf16."""
SHORT = {"s_dense", "at_moe", "at_moe_n8", "at_moe_n8_sampled", "advmoe_experts_step"}
UNROUTED = {"s_dense", "dense", "reference", "s_dense_bf16", "dense_bf16"}
"""Steps whose convolutions always have the size of the batch."""
RATIOS = {
    "at_moe_vs_s_dense": ("at_moe", "s_dense"),
    "advmoe_experts_step_vs_s_dense": ("advmoe_experts_step", "s_dense"),
    "advmoe_vs_at_moe": ("advmoe", "at_moe"),
    "advmoe_vs_reference": ("reference", "advmoe"),
    "cheap_vs_at_moe": ("cheap", "at_moe"),
    "cheap_vs_reference": ("reference", "cheap"),
    "cost_n8_vs_n2": ("at_moe_n8", "at_moe"),
    "cost_n8_vs_n2_sampled": ("at_moe_n8_sampled", "at_moe"),
    **{f"{name}_fp32_vs_bf16": (name, f"{name}_bf16") for name in ("s_dense", "dense", "at_moe", "advmoe")},
}
"""Ratios of two steps' times: numerator and denominator."""


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=45.0, help="start no round of steps after so much CPU time")
    parser.add_argument("--only", nargs="+", choices=[*USUAL, *FURTHER], help="steps to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, number, size = (0.0625, 8, 16) if options.smoke else (options.width, options.batch_size, 32)
    batches = images(2 if options.smoke else 4, number, size, seed=1)

    def model_of(kind: str, **settings: Any) -> RoutedNetwork:
        config = ModelConfig(arch="resnet18", width=width, image_size=size, kind=kind, **settings)  # type: ignore[arg-type]
        return subject(config, batches)

    moe = model_of("moe")
    makers: dict[str, Callable[[], Step]] = {
        "s_dense": lambda: step_of(model_of("s_dense"), "at", batches),
        "dense": lambda: step_of(model_of("dense"), "at", batches),
        "at_moe": lambda: step_of(moe, "at", batches),
        "at_moe_n8": lambda: step_of(model_of("moe", num_experts=8), "at", batches),
        "advmoe_experts_step": lambda: step_of(moe, "expert_at", batches),  # AdvMoE's upper level alone
        "advmoe": lambda: step_of(moe, "advmoe", batches),
        "cheap": lambda: step_of(moe, "advmoe", batches, **CHEAP),
        "reference": lambda: reference_step_of(model_of("moe", router_gradient="straight_through"), batches),
        "at_moe_n8_sampled": lambda: step_of(model_of("moe", num_experts=8, router_gradient="sampled"), "at", batches),
        "s_dense_bf16": lambda: step_of(model_of("s_dense"), "at", batches, **HALF),
        "dense_bf16": lambda: step_of(model_of("dense"), "at", batches, **HALF),
        "at_moe_bf16": lambda: step_of(moe, "at", batches, **HALF),
        "advmoe_bf16": lambda: step_of(moe, "advmoe", batches, **HALF),
    }
    subjects = {name: makers[name]() for name in options.only or (USUAL + FURTHER if options.smoke else USUAL)}
    taken: dict[str, list[float]] = {}
    rounds = 0
    while rounds < 1 or (time.process_time() < options.seconds and not options.smoke):
        for turn in range(3):
            for name, step in subjects.items():
                if turn and name not in SHORT:
                    continue
                if turn == 0 and name not in UNROUTED:
                    step(rounds)
                start = time.thread_time()
                step(rounds)
                taken.setdefault(name, []).append(time.thread_time() - start)
        rounds += 1
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    figures: dict[str, Any] = {
        **{name: seconds[a] / seconds[b] for name, (a, b) in RATIOS.items() if {a, b} <= set(seconds)},
        "images_per_second": {name: round(number / value, 2) for name, value in seconds.items()},
        "busiest_expert": busiest(moe, batches),
        "rounds": rounds,
        "width": width,
        "batch_size": number,
        **harness.machine(),
    }
    figures = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    harness.emit(figures, as_json=options.json)


if __name__ == "__main__":
    main()
