"""Backward passes that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse second derivatives of a node of autograd, at once.

    `torch.autograd.function.once_differentiable` puts its error on the gradients' history, which
    `torch.autograd.grad` by another tensor never reaches: part of the derivative would be missing
    without an error.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "routed layers and norms over several ranks have first derivatives only; "
                "call backward or torch.autograd.grad without create_graph"
            )
        return backward(ctx, *gradients)

    return checked
