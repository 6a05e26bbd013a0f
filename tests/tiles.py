"""Compares the convolution by tiles with the sorted one, in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU.

As a program it prints JSON.
"""

import copy
import json
import sys
from typing import Any

import torch
from torch import Tensor

from advmoe.models.dispatch import computing
from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.routing import Decision

LAYOUTS = {
    "halves": ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5),
    "overlap": ExpertLayout(num_channels=8, num_experts=3, model_scale=0.5),
    "wide": ExpertLayout(num_channels=136, num_experts=4, model_scale=0.5),
}
CASES: list[dict[str, Any]] = [
    {"layout": "halves", "kernel": 3, "stride": 1, "signal": "all"},
    {"layout": "halves", "kernel": 3, "stride": 2, "signal": "mean"},
    {"layout": "overlap", "kernel": 3, "stride": 2, "signal": "sampled", "affine": True},
    {"layout": "overlap", "kernel": 1, "stride": 2, "signal": "own", "affine": True},
    {"layout": "overlap", "kernel": 3, "stride": 1, "signal": "all", "affine": True},
    {"layout": "wide", "kernel": 1, "stride": 1, "signal": "mean", "size": 9},
]


def compared(case: dict[str, Any], device: str = "cpu") -> dict[str, float]:
    """Largest difference of output and gradients from those on the CPU, relative to the largest value of each."""
    torch.manual_seed(0)
    layout = LAYOUTS[case["layout"]]
    kernel, size, number = case["kernel"], case.get("size", 6), layout.num_experts
    layer = MoEConv2d(5, layout, kernel, stride=case["stride"], padding=kernel // 2, affine=case.get("affine", False))
    if layer.affine is not None:
        torch.nn.init.normal_(layer.affine.scale, std=0.3)
        torch.nn.init.normal_(layer.affine.shift)
    x = torch.randn(7, 5, size, size)
    chosen_B2 = torch.tensor([0, 1, 1, 0, number - 1, 0, 0])[:, None].repeat(1, 2)
    other_B = torch.arange(7) % number
    one_column = case["signal"] in ("own", "mean")
    gate = torch.ones((7,) if one_column else (7, number))

    def run(way: Any, device: str) -> dict[str, Tensor]:
        own = copy.deepcopy(layer).to(device)
        leaves = {name: leaf.clone().to(device).requires_grad_() for name, leaf in (("x", x), ("gate", gate))}
        inputs = {**leaves, **dict(own.named_parameters())}
        # the choice is a column of pathways, so its numbers do not lie side by side
        decision = Decision(chosen_B2.to(device)[:, 0], None, leaves["gate"], case["signal"], other_B.to(device))
        with computing(way):
            y = own(leaves["x"], decision)
        toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        gradients = torch.autograd.grad(y, list(inputs.values()), toward)
        return {name: value.detach().cpu() for name, value in zip(("y", *inputs), (y, *gradients), strict=True)}

    expected, found = run("auto", "cpu"), run("tiles", device)
    return {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}


if __name__ == "__main__":
    json.dump([compared(case) for case in CASES], sys.stdout)
