"""What BatchNorm over several ranks gives to torch's kernels. `tests/test_distributed.py` compares its results."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe import distributed
from advmoe.models import batch_norm
from advmoe.models.batch_norm import BatchNorm2d
from advmoe.world import World


class Calls(TorchDispatchMode):
    """Notes the arguments of each call of one of torch's operators, by their names."""

    def __init__(self, operator: torch._ops.OpOverload) -> None:
        super().__init__()
        self.operator = operator
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is self.operator:
            self.seen.append(dict(zip((a.name for a in func._schema.arguments), args, strict=False)))
        return func(*args, **(kwargs or {}))


def test_kernels_get_the_statistics_of_the_union_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels of CPUs ignore the saved statistics, so only the call shows them. This rank has the values 1 and 3 (mean
    # 2, variance 1), the other one 5 and 7 (mean 6, variance 1). Their union has the mean 4 and the variance
    # (9 + 1 + 1 + 9) / 4 = 5. With eps = 4, 1 / sqrt(5 + 4) = 1/3.
    other_3 = torch.tensor([6.0, 1.0, 2.0])
    monkeypatch.setattr(distributed, "_world", World(rank=0, size=2))
    monkeypatch.setattr(batch_norm, "stack_all", lambda own: torch.stack((own, other_3)))
    monkeypatch.setattr(batch_norm, "sum_up", lambda _: None)
    norm = BatchNorm2d(1, eps=4.0)
    y: Tensor = norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    with Calls(torch.ops.aten.native_batch_norm_backward.default) as calls:
        y.sum().backward()
    (call,) = calls.seen
    expected = {"running_mean": 4.0, "running_var": 5.0, "save_mean": 4.0, "save_invstd": 1 / 3}
    assert {name: call[name] for name in expected} == pytest.approx(expected)
    assert (call["train"], call["eps"]) == (False, 4.0)
