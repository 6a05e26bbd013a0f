"""Evaluation in fp32, whatever precision a model was trained in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from advmoe.errors import ConfigError


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Switches TF32, bf16 and autocast off. They round differently from batch to batch and can mask gradients.

    Raises:
        ConfigError: The model's parameters are not fp32.
    """
    kinds = {str(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
    if kinds - {"torch.float32", "torch.float64"}:
        raise ConfigError(
            f"robustness is measured in fp32, got parameters in {', '.join(sorted(kinds))}; use model.float()"
        )
    exact = _switches()
    before = [getattr(place, name) for place, name, _ in exact]
    for place, name, value in exact:
        setattr(place, name, value)
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for (place, name, _), value in zip(exact, before, strict=True):
            setattr(place, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value) that make fp32 arithmetic exact.

    Since torch 2.9, reading the older `allow_tf32` raises an error after any use of
    `fp32_precision`; this setting does not.
    """
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        cudnn, mkldnn = backends.cudnn, backends.mkldnn
        places: tuple[Any, ...] = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
        return [(place, "fp32_precision", "ieee") for place in places]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
