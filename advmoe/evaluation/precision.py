"""Numbers are measured in fp32, whatever a model was trained in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from advmoe.errors import ConfigError


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Without TF32 and autocast, which round differently from batch to batch and can mask gradients.

    Raises:
        ConfigError: the model's parameters are not fp32.
    """
    kinds = {str(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
    if kinds - {"torch.float32", "torch.float64"}:
        raise ConfigError(
            f"robustness is measured in fp32, got parameters in {', '.join(sorted(kinds))}; use model.float()"
        )
    matmul, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolutions
