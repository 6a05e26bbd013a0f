"""Compiled passes: one graph, equal results, and where they are used."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TRAIN, assert_identical, contents, train
from torch import Tensor

from advmoe.data.sources import Dataset
from advmoe.errors import ConfigError
from advmoe.models.compiled import CompiledNetwork
from advmoe.models.network import RoutedNetwork


@pytest.mark.slow
def test_a_network_in_training_is_one_graph_with_equal_logits_and_gradients(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg(warm=True, routed="last-3-stages")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = CompiledNetwork(model, backend="aot_eager")  # raises where a graph breaks
    found: list[tuple[Tensor, Tensor, tuple[Tensor, ...]]] = []
    for one_graph in (False, True):
        model.load_state_dict(state)
        x = images.clone().requires_grad_()
        if one_graph:
            with compiled.running():
                logits, routing = model.forward_with_routing(x)
        else:
            logits, routing = model.forward_with_routing(x)
        gradients = torch.autograd.grad(logits.log_softmax(dim=1)[:, 0].sum(), [x, *model.parameters()])
        found.append((logits, routing.expert_index_BL, gradients))
    (logits, experts_BL, gradients), (of_graph, experts_of_graph_BL, of_graph_gradients) = found
    assert torch.equal(experts_of_graph_BL, experts_BL)
    assert all(len(column.unique()) == 2 for column in experts_BL.T[:2]), "both experts should be at work"
    torch.testing.assert_close(of_graph, logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(of_graph_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()) + 1e-9)


def test_attacks_and_steps_run_compiled_and_validation_does_not(
    digits: Dataset, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    passes: list[bool] = []

    def compile_nothing(compute: Callable[..., Any], **how: Any) -> Callable[..., Any]:
        asked.append(how)
        return lambda *args: (passes.append(True), compute(*args))[1]

    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert train(digits, tmp_path / "run", dataclasses.replace(TRAIN, compile="kernels"))
    # 4 steps of 2 levels: TRADES's clean pass, 2 steps of the attack, and a clean and an
    # adversarial pass to descend.
    assert len(passes) == 4 * 2 * 5
    assert [(how["fullgraph"], how["dynamic"], how["mode"]) for how in asked] == [(True, False, None)]
    run, whole = contents(tmp_path / "run"), contents(whole_run)
    assert_identical(run["records"], whole["records"])
    assert_identical(run["last"].weights, whole["last"].weights)


def test_graphs_of_kernels_need_a_gpu(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compile graphs needs a GPU; use kernels or off"):
        train(digits, tmp_path / "run", dataclasses.replace(TRAIN, compile="graphs"))
