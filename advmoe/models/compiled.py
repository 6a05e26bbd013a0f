"""Compiles a network's passes, so that they need fewer kernels, which a GPU starts together.

A compiled graph cannot depend on the choice of experts. All experts are therefore computed, and one
is selected (`advmoe.models.dispatch.select`). Logits and gradients are equal up to rounding. Random
numbers, such as the noise of an attack, are drawn outside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from advmoe.errors import ConfigError
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

GRAPHS = 32
"""Maximum number of compiled forms of one network. Forms differ in the modes of its parts, in the
tensors that need gradients, and in the number of images."""


class CompiledNetwork:
    """The passes of one network, each compiled at its first call.

    Args:
        network: May change its modes, and what needs gradients: each combination is compiled once.
        graphs: Whether a GPU gets all kernels of a pass at once (CUDA graphs).
        backend: Backend of the compiler.

    Raises:
        ConfigError: The machine has no compiler. The error comes at the first compiled pass.
    """

    def __init__(self, network: RoutedNetwork, *, graphs: bool = False, backend: str = "inductor") -> None:
        self._network = network
        self._graphs = graphs
        how: dict[str, Any] = {"recompile_limit": GRAPHS, "isolate_recompiles": True}
        self._compute: Callable[[Tensor, Tensor | None], tuple[Tensor, Routing]] = torch.compile(
            lambda images, pathways: network.compute(images, pathways),
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode="reduce-overhead" if graphs else None,
            **how,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the context, the network's passes are compiled, except passes of attacks that change the routing."""
        self._network.compiled = self._run
        try:
            yield
        finally:
            del self._network.compiled

    def _run(self, images: Tensor, pathways: Tensor | None) -> tuple[Tensor, Routing]:
        try:
            logits, routing = self._compute(images, pathways)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"the network cannot be compiled here: {reason}; leave it uncompiled", "compile"
            ) from error
        if not self._graphs:
            return logits, routing
        # the next pass through a graph writes its outputs to the same place
        return logits.clone(), Routing(*(None if part is None else part.clone() for part in routing))  # type: ignore[arg-type]
