"""Compiles a network's passes, so that they need fewer kernels, which a GPU starts together.

A compiled graph cannot depend on the choice of experts. All experts are therefore computed, and one
is selected (`advmoe.models.dispatch.select`). Logits and gradients are equal up to rounding. Random
numbers, such as the noise of an attack, are drawn outside the graph.

A compiler may have defects that show in some networks only. The first pass of each compiled form is
therefore compared with the same pass uncompiled. If its numbers are not finite, the next one is.
With CUDA graphs the pass is repeated until a graph is replayed, and the replay is compared.

Shape suffixes: B batch, L MoE layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from advmoe.config import check
from advmoe.device import convolves_in_tf32
from advmoe.errors import CompilerError
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

GRAPHS = 32
"""Maximum number of compiled forms of one network. Forms differ in the modes of its parts, in the
tensors that need gradients, and in the number of images."""
LARGEST = {"fp32": (1e-3, 0.1), "tf32": (0.03, 0.4), "bf16": (0.25, 0.7)}
"""Largest distances that pass for rounding, by arithmetic. For logits it is the median over images,
relative to the largest logit, because rounding may change decisions of single images. For gradients
it is relative to their norm, so that a gradient of zero has 1. Right bf16 passes had .03 and .28, a
wrong fp32 kernel had more than 1 for the gradients. TF32 was not measured. It has three more bits
than bf16, so about .004 and .1 are expected."""

SIZES = 4
"""Maximum number of sizes of a batch that are compiled. A training has a batch, a share of it for the routers, and
parts of both. Other sizes are those of batches with unreadable images; they are rare, and compilation takes minutes."""

REPLAYED = 3
"""Calls of a form until a CUDA graph is replayed: torch warms up in the first and records in the second."""


class CompiledNetwork:
    """The passes of one network, each compiled at its first call. Batches of rare sizes are not compiled.

    Args:
        network: May change its modes, and what needs gradients: each combination is compiled once.
        graphs: Whether a GPU gets all kernels of a pass at once (CUDA graphs).
        backend: Backend of the compiler.

    Raises:
        CompilerError: The compiler has failed, for example because the machine has none, or because
            Ctrl-C has ended its processes. The error comes at the first pass of a form.
        ConfigError: Compiled passes differ from uncompiled ones, likewise.
    """

    def __init__(
        self, network: RoutedNetwork, *, graphs: bool = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._network = network
        self._graphs = graphs
        self._modules, self._parameters = list(network.modules()), list(network.parameters())
        self._sizes: set[int] = set()
        self._checked: set[tuple[Any, ...]] = set()
        self._compute: Callable[[Tensor, Tensor | None], tuple[Tensor, Routing]] = _compile(
            lambda images, pathways: network.compute(images, pathways),
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode="reduce-overhead" if graphs else None,
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
        if len(self._sizes | {len(images)}) > SIZES:
            return self._network.compute(images, pathways)
        self._sizes.add(len(images))
        form = self._form(images, pathways)
        try:  # the check also computes a gradient, for which the backward pass is compiled
            if form not in self._checked and self._check(images, pathways):
                self._checked.add(form)
            return self._compiled(images, pathways)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise CompilerError(
                f"the network cannot be compiled here: {reason}; leave it uncompiled", "compile"
            ) from error

    def _compiled(self, images: Tensor, pathways: Tensor | None) -> tuple[Tensor, Routing]:
        logits, routing = self._compute(images, pathways)
        if not self._graphs:
            return logits, routing
        # the next pass through a graph writes its outputs to the same place
        return logits.clone(), Routing(*(None if part is None else part.clone() for part in routing))  # type: ignore[arg-type]

    def _form(self, images: Tensor, pathways: Tensor | None) -> tuple[Any, ...]:
        """Everything that a compiled form depends on."""
        return (
            tuple(images.shape),
            images.requires_grad,
            pathways is None,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(images.device.type),
            tuple(module.training for module in self._modules),
            tuple(parameter.requires_grad for parameter in self._parameters),
        )

    def _check(self, images: Tensor, pathways: Tensor | None) -> bool:
        """Compare a pass with the uncompiled one, without a trace in the network's statistics.

        Returns:
            Whether they could be compared. Uncompiled numbers that are not finite say nothing.

        Raises:
            ConfigError: They differ.
        """
        arguments = images, pathways
        expected, gradient, routed_BL = self._without_trace(self._network.compute, *arguments)
        for _ in range(REPLAYED if self._graphs else 1):
            got, of_compiled, routed_compiled_BL = self._without_trace(self._compiled, *arguments)
        if not (expected.isfinite().all() and gradient.isfinite().all()):
            return False
        same_B = (routed_compiled_BL == routed_BL).all(dim=1)
        if not same_B.all():  # an image on another pathway has another gradient, and is no sign of a fault
            _, gradient, _ = self._without_trace(self._network.compute, *arguments, same_B)
            _, of_compiled, _ = self._without_trace(self._compiled, *arguments, same_B)
        most, most_of_gradient = limits(images.device)
        distance = float((got - expected).abs().amax(dim=1).median() / expected.abs().amax())
        of_gradient = float((of_compiled - gradient).norm() / gradient.norm()) if gradient.any() else 0.0
        check(
            distance <= most and of_gradient <= most_of_gradient,
            f"compiled passes differ from uncompiled ones: logits by {distance:.2g} of the largest (at most {most:g} "
            f"is rounding), gradients by {of_gradient:.2g} of their norm (at most {most_of_gradient:g}); leave the "
            "network uncompiled",
            "compile",
        )
        return True

    def _without_trace(
        self,
        compute: Callable[..., tuple[Tensor, Routing]],
        images: Tensor,
        pathways: Tensor | None,
        chosen_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits and the pathways of one pass, and a gradient of all images or of chosen ones.

        The network's buffers keep their values.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self._network.buffers()]
        logits, routing = compute(images, pathways)
        gradient = self._gradient(logits, images, chosen_B)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return logits.detach(), gradient, routing.expert_index_BL

    def _gradient(self, logits: Tensor, images: Tensor, chosen_B: Tensor | None) -> Tensor:
        """A gradient of the logits by all that needs one, in one vector."""
        inputs = [tensor for tensor in (images, *self._parameters) if tensor.requires_grad]
        if not logits.requires_grad:
            return logits.new_zeros(1)
        values_B = logits.float().log_softmax(dim=1)[:, 0]
        value = (values_B if chosen_B is None else values_B[chosen_B]).sum()
        found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return torch.cat([each.flatten().float() for each in found])


def _compile(compute: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`torch.compile` for up to `GRAPHS` forms of this function alone."""
    compiler: Callable[..., Any] = torch.compile  # the stubs of no version know the options of all
    compiled: Callable[..., Any]
    if "recompile_limit" in inspect.signature(compiler).parameters:
        compiled = compiler(compute, recompile_limit=GRAPHS, isolate_recompiles=True, **how)
    else:  # there is one limit for all functions, and forms are counted by code object
        compute.__code__ = compute.__code__.replace()
        compiled = torch._dynamo.config.patch(recompile_limit=GRAPHS)(compiler(compute, **how))
    return compiled


def limits(device: torch.device) -> tuple[float, float]:
    """The largest distances of logits and gradients (`LARGEST`) in the present arithmetic of a device."""
    if torch.is_autocast_enabled(device.type):
        return LARGEST["bf16"]
    if device.type != "cuda":
        return LARGEST["fp32"]
    return LARGEST["tf32" if convolves_in_tf32() else "fp32"]
