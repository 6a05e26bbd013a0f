"""The results of a module for images, with every decision of its routers: what a file is compared with.

Shape suffixes: B batch, H height, L MoE layers, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from advmoe_export.session import FloatArray

IMAGES_AT_A_TIME = 64
"""Largest batch that the module computes."""
PROBES = 64
"""Number of synthetic images."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The results of the module for B images."""

    images: npt.NDArray[Any]
    """Images in the input format of the file."""
    logits: FloatArray
    """[B, classes]"""
    expert_index: npt.NDArray[np.int64]
    """[B, L]"""
    margin: FloatArray
    """[B, L]; infinite if a decision does not come from router logits."""

    def __getitem__(self, rows: Any) -> Reference:
        return Reference(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


def run_reference(program: Any, images: npt.NDArray[Any]) -> Reference:
    """Run a traced program in torch, and record every routing decision.

    Args:
        program: a `torch.export.ExportedProgram` from float images in [0, 1] to logits.
        images: float32 [B, 3, H, W] in [0, 1] or uint8 [B, H, W, 3].
    """
    import torch

    from advmoe_export.operators import ATTRIBUTES, DOMAIN

    domain = getattr(torch.ops, DOMAIN)
    routed = {getattr(domain, name).default for name in ATTRIBUTES if hasattr(domain, name)}
    network = program.module()
    decisions = [node.args[3] for node in network.graph.nodes if node.target in routed]
    starts = range(0, len(images), IMAGES_AT_A_TIME)
    parts = [_run_module(network, decisions, images[start : start + IMAGES_AT_A_TIME]) for start in starts]
    return Reference(images=images, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _run_module(network: Any, decisions: Sequence[Any], images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """The results of one batch by their names in `Reference`.

    Args:
        network: a `torch.fx.GraphModule`.
        decisions: the node of each MoE layer's decision.
        images: as in `run_reference`.
    """
    import torch

    chosen: dict[Any, Any] = {}
    margins: dict[Any, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n in decisions:
                chosen[n] = result.reshape(len(x), -1)
                margins[n] = self.margin(n, result).reshape(len(x), -1)
            return result

        def margin(self, decision: Any, result: Any) -> Any:
            logits = self.env[decision.args[0]] if decision.target == torch.ops.aten.argmax.default else None
            if logits is None or logits.shape[-1] == 1:
                return torch.full(result.shape, torch.inf)
            first_second = logits.topk(2, dim=-1).values
            return first_second[..., 0] - first_second[..., 1]

    x = as_float_tensor(images)
    with torch.no_grad():
        logits = Recorder(network).run(x)
    none = torch.zeros((len(x), 0))
    return {
        "logits": logits.numpy(),
        "expert_index": torch.cat([none.long(), *(chosen[node] for node in decisions)], dim=1).numpy(),
        "margin": torch.cat([none, *(margins[node] for node in decisions)], dim=1).numpy(),
    }


def first_beyond(program: Any, images: npt.NDArray[Any], limit: float) -> tuple[str, float] | None:
    """The first value that the module computes beyond a limit: the layer or operator, and the largest magnitude.

    The input of a BatchNorm does not count, because a file has it only together with the BatchNorm.

    Args:
        program: as in `run_reference`.
        images: likewise.
        limit: largest magnitude that is accepted.
    """
    import torch

    network = program.module()
    largest: dict[Any, float] = {}

    class Measure(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor) and result.is_floating_point():
                largest[n] = max(largest.get(n, 0.0), float(result.abs().max()))
            return result

    with torch.no_grad():
        for start in range(0, len(images), IMAGES_AT_A_TIME):
            Measure(network).run(as_float_tensor(images[start : start + IMAGES_AT_A_TIME]))
    for node, size in largest.items():
        if size > limit and not all("batch_norm" in str(user.target) for user in node.users):
            layer = [path for path, _ in node.meta.get("nn_module_stack", {}).values()][-1:]
            return (layer[0] if layer and layer[0] else str(node.name)), size
    return None


def as_float_tensor(images: npt.NDArray[Any]) -> Any:
    """Images as a float tensor [B, 3, H, W] in [0, 1], the input of the module."""
    import torch

    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def probe_images(image_size: tuple[int, int], input_type: str, count: int = PROBES) -> npt.NDArray[Any]:
    """Synthetic images with different color, contrast and structure, so that their pathways differ."""
    rng = np.random.default_rng(0)
    height, width = image_size
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    phase = rng.uniform(0, 2 * np.pi, (count, 3, 1, 1))
    waves = rng.uniform(0, 8 * np.pi, (2, count, 1, 1, 1))
    pattern = np.sin(waves[0] * x + waves[1] * y + phase)
    noise = rng.standard_normal((count, 3, height, width)) * rng.uniform(0, 1, (count, 1, 1, 1))
    color, contrast = rng.uniform(0.1, 0.9, (count, 3, 1, 1)), rng.uniform(0.05, 0.5, (count, 1, 1, 1))
    pixels = np.rint(np.clip(color + contrast * (pattern + noise), 0, 1) * 255).astype(np.uint8)
    if input_type == "uint8":
        return cast("npt.NDArray[Any]", pixels.transpose(0, 2, 3, 1).copy())
    return cast("npt.NDArray[Any]", np.divide(pixels, 255, dtype=np.float32))
