"""Gradients through hard routing, as attackers may use them. No tape here changes a decision or an output.

The argmax of a router has no gradient, and the model itself shows none (`RoutingTape.seen`). An
attack on the unmodified model therefore treats the pathway as constant. A surrogate gradient shows
more, but each surrogate has a blind spot: straight-through hides the experts that were not chosen,
and a confident softmax has almost no gradient. An attack that follows one surrogate alone flatters
the model.

The tapes differ in the backward pass only, so an adversarial image that one of them finds is
adversarial for the model itself, up to rounding. `RoutedNetwork.forward_with_routing` takes the
tape as an argument; no module stores it.

Shape suffixes: B batch, C channels, H height, L MoE layers, N experts, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Forward, plain
from advmoe.config import RouterGradient
from advmoe.models.network import RoutedNetwork, TapeType
from advmoe.models.routing import Decision, Routing, RoutingTape, gate

GATES: tuple[RouterGradient, ...] = ("advantage", "softmax", "straight_through")
"""Surrogate gradients of the argmax that cost one expert."""
TEMPERATURES = (1.0, 10.0)
"""Temperatures of the softmax relaxation. At a higher one, an attack sees more of experts with low logits."""


DETACHED = "detached"
"""Name of the view that is the model itself: no gradient passes its routers."""


class SeeingTape(RoutingTape):
    """For autograd, the routers' logits depend on the images too. The decisions have no gradient."""

    def seen(self, x_BCHW: Tensor) -> Tensor:
        """The layer's input itself."""
        return x_BCHW


class GatedTape(SeeingTape):
    """A gate of value 1 on the chosen expert's output; see `advmoe.models.routing.gate`."""

    def __init__(
        self,
        routers: nn.ModuleList,
        router_of_layer: Sequence[int],
        forced_BL: Tensor | None = None,
        *,
        router_gradient: RouterGradient,
    ) -> None:
        super().__init__(routers, router_of_layer, forced_BL)
        self._router_gradient = router_gradient

    def decide(self, layer: int, x_BCHW: Tensor) -> Decision:
        """The decision, with the gate of this tape."""
        decision = super().decide(layer, x_BCHW)
        if decision.logits_BN is None:
            return decision
        gate_B = gate(decision.logits_BN, decision.expert_index_B, self._router_gradient)
        return decision._replace(gate=gate_B, signal="mean" if self._router_gradient == "advantage" else "own")


class MixtureTape(SeeingTape):
    """Gradient of the experts' mixture weighted by softmax(router logits / temperature) (BPDA, Athalye et al., 2018).

    Only this relaxation sees the outputs of the experts that were not chosen. It costs N experts
    instead of one.
    """

    def __init__(
        self,
        routers: nn.ModuleList,
        router_of_layer: Sequence[int],
        forced_BL: Tensor | None = None,
        *,
        temperature: float,
    ) -> None:
        super().__init__(routers, router_of_layer, forced_BL)
        self._temperature = temperature

    def apply(self, layer: int, x_BCHW: Tensor, compute: Callable[[Tensor, Decision], Tensor]) -> Tensor:
        """The value is the chosen expert's output; the gradient is the mixture's."""
        decision = self.decide(layer, x_BCHW)
        logits_BN = decision.logits_BN
        if logits_BN is None or not logits_BN.requires_grad:
            return compute(x_BCHW, decision)
        weight_BN = (logits_BN / self._temperature).softmax(dim=1)
        chosen_B, number = decision.expert_index_B, logits_BN.shape[1]
        outputs = [
            compute(x_BCHW, decision._replace(expert_index_B=torch.full_like(chosen_B, e), gate=None, alone=e))
            for e in range(number)
        ]
        output_NB = torch.stack(outputs)
        places = (1,) * (output_NB.ndim - 2)
        mixture_B = (weight_BN.T.reshape(*weight_BN.T.shape, *places) * output_NB).sum(dim=0)
        own_B = output_NB[chosen_B, torch.arange(len(x_BCHW), device=x_BCHW.device)].detach()
        return own_B + (mixture_B - mixture_B.detach())


class SteeredTape(SeeingTape):
    """Takes a given pathway, and also asks the routers along it, with gradients.

    If every router agrees with the given pathway, the model takes it too and computes the same
    output. A layer whose given expert is -1 follows its router.
    """

    def decide(self, layer: int, x_BCHW: Tensor) -> Decision:
        """The given expert, with the logits of the layer's router."""
        assert self._forced_BL is not None
        router = self._router_of_layer[layer]
        if router not in self._decisions:
            logits_BN, given_B = self._routers[router](x_BCHW), self._forced_BL[:, layer]
            expert_index_B = torch.where(given_B < 0, logits_BN.argmax(dim=1), given_B)
            self._decisions[router] = Decision(expert_index_B, logits_BN, scales=self._scales)
        return self._decisions[router]

    def read(self) -> Routing:
        """The pathway taken and the routers' logits along it."""
        forced_BL, self._forced_BL = self._forced_BL, None
        try:
            return super().read()
        finally:
            self._forced_BL = forced_BL


def view(model: RoutedNetwork, tape_type: TapeType) -> Forward:
    """The model's logits, with the gradient that a tape gives them."""
    return lambda images, _: model.forward_with_routing(images, tape_type=tape_type)[0]


def mixture_view(model: RoutedNetwork, temperature: float = TEMPERATURES[0]) -> Forward:
    """The model's logits, with the gradient of the experts' mixture."""
    return view(model, partial(MixtureTape, temperature=temperature))


def routing_views(model: nn.Module, temperatures: Sequence[float] = TEMPERATURES) -> dict[str, Forward]:
    """All views of a model that an attack should follow, by name. Every view has the model's own outputs.

    `detached` is the model itself. A view named after a router gradient adds its gate. `mixture@T`
    mixes the experts at temperature T. A network without a choice of experts has one view: {"own":
    model}.
    """
    if not is_routed(model):
        return {"own": plain(model)}
    tapes: dict[str, TapeType] = {name: partial(GatedTape, router_gradient=name) for name in GATES}
    tapes |= {f"mixture@{temperature:g}": partial(MixtureTape, temperature=temperature) for temperature in temperatures}
    return {DETACHED: plain(model)} | {name: view(model, tape) for name, tape in tapes.items()}


def is_routed(model: nn.Module) -> TypeGuard[RoutedNetwork]:
    """Whether the model has a choice of experts."""
    return isinstance(model, RoutedNetwork) and bool(model.expert_layouts) and model.config.num_experts > 1
