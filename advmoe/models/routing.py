"""Routing as plain values: the expert of each image in each MoE layer.

An MoE layer is a router plus one convolution (paper, Sec. 3). The router picks one of N experts per
image. An image's *pathway* is the list of its experts in all layers. No module stores a decision: a
forward pass opens a `RoutingTape`, each layer asks the tape for its decision, and the tape returns
a `Routing` at the end.

Shape suffixes: B batch, C channels, H height, L MoE layers, N experts, R routers (at most L, as
several layers may share one), W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advmoe.config import RouterGradient
from advmoe.distributed import positions, share_of_union
from advmoe.models.first_order import first_order

Signal = Literal["own", "mean", "all", "sampled"]
"""Factor of the gate's gradient (`Decision.gate`)."""


class Decision(NamedTuple):
    """The decision of one router for a batch. The layer's output is that of the chosen expert, whatever the gate is."""

    expert_index_B: Tensor
    logits_BN: Tensor | None
    gate: Tensor | None = None
    """Carries the router's gradient; None if none is needed. Its value does not matter. Let g_b be
    the gradient of the loss by image b's output, y_e the output of expert e for that image, and c
    the chosen expert. Then the gradient of the gate is

    - `own`, a gate [B]: <g_b, y_c>. The router only learns whether scaling the output lowers the
      loss; choosing an expert cannot scale it.
    - `mean`, a gate [B]: <g_b, y_c - mean of all y_e>, the change of the loss if the chosen expert
      differed more from the mean expert.
    - `all`, a gate [B, N]: <g_b, y_e - y_c> in column e, the change of the loss toward each other
      expert. It costs N experts in the backward pass, and one expert for N = 2.
    - `sampled`, a gate [B, N]: the same in column `other_B[b]` only. It costs one expert in the
      backward pass.
    """
    signal: Signal = "own"
    other_B: Tensor | None = None
    """For `sampled`: another expert of each image, int64 in [0, N)."""
    scales: bool = False
    """Whether the layer's output is multiplied by the router's probability of the chosen expert (`scaled`)."""
    alone: int | None = None
    """The expert of all images, where that is known without looking; there is no gate then. A GPU
    need not ask the images, nor compute the other experts."""


class Routing(NamedTuple):
    """The pathways of a batch: `expert_index_BL` int64 in [0, N), and the routers' logits (None if forced)."""

    expert_index_BL: Tensor
    logits_BRN: Tensor | None


def gate(logits_BN: Tensor, expert_index_B: Tensor, router_gradient: RouterGradient) -> Tensor:
    """A factor with value 1 that passes gradients through the argmax.

    `softmax` and `advantage` are p_e / stopgrad(p_e), whose gradient reaches all logits. They
    differ in the factor of the gate's gradient (`Decision`). `straight_through` is 1 + logit_e -
    stopgrad(logit_e), whose gradient reaches the chosen logit only, as in the authors' released
    code. The softmax form is computed in log space, where nothing underflows.
    """
    score_BN = logits_BN if router_gradient == "straight_through" else logits_BN.log_softmax(dim=1)
    score_B = score_BN.gather(1, expert_index_B.unsqueeze(1)).squeeze(1)
    difference_B = score_B - score_B.detach()
    return 1.0 + difference_B if router_gradient == "straight_through" else difference_B.exp()


class _Comparison(torch.autograd.Function):
    """The logits as a gate, whose gradient v_e - v_c, v_e = <dL/dy, y_e>, says where the loss falls; see `compared`."""

    @staticmethod
    def forward(ctx: Any, logits_BN: Tensor, chosen_B1: Tensor, other_B1: Tensor | None, size: float | None) -> Tensor:
        ctx.size = size
        ctx.save_for_backward(logits_BN, chosen_B1, other_B1)
        return logits_BN.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, value_BN: Tensor) -> tuple[Tensor, None, None, None]:
        logits_BN, chosen_B1, other_B1 = ctx.saved_tensors
        if ctx.size is not None:
            total = value_BN.abs().amax(dim=1).sum().clamp(min=torch.finfo(value_BN.dtype).tiny)
            value_BN = value_BN * (ctx.size / total)
        if other_B1 is None:
            probability_BN = logits_BN.softmax(dim=1)
            expected_B1 = (probability_BN * value_BN).sum(dim=1, keepdim=True)
            return probability_BN * (value_BN - expected_B1), None, None, None
        probability_B1 = (logits_BN.gather(1, other_B1) - logits_BN.gather(1, chosen_B1)).sigmoid()
        difference_B1 = value_BN.gather(1, other_B1) - value_BN.gather(1, chosen_B1)
        push_B1 = probability_B1 * (1.0 - probability_B1) * difference_B1
        push_BN = torch.zeros_like(value_BN).scatter(1, other_B1, push_B1).scatter(1, chosen_B1, -push_B1)
        return push_BN, None, None, None


def compared(chosen_B: Tensor, logits_BN: Tensor, *, sampled: bool, relative: bool = False) -> Decision:
    """A decision whose router learns by comparing the expert chosen, c, with others.

    With v_e = <dL/dy, y_e>, the loss changes to first order by v_e - v_c if e takes over. The
    router's gradient is that of the expected loss if it drew the expert with the probabilities that
    its logits give: p_e * (v_e - mean of v under p). `sampled` does this for c and one other expert
    o of each image in turn, whose values cost one expert instead of N: the logits of o and c get
    plus and minus p * (1 - p) * (v_o - v_c), where p = sigmoid(l_o - l_c). At N = 2 both are equal.

    Coupled experts differ little, so the differences between their values are small, and routers
    hardly move. `relative` divides the values of a pass by the sum of the images' largest
    differences. A router's learning speed then does not depend on the similarity of its experts.
    Where a batch is computed in parts, by several ranks or one after another, each part is divided
    by its own sum and counts by its share of the images.

    A comparison of c with the best other expert alone raises the logit of a better one more often.
    But experts then do not become different: an expert is chosen more for an image only where it is
    the best of all already (docs/log.md, 2026-11-30).
    """
    number = logits_BN.shape[1]
    size = share_of_union() if relative else None
    if not sampled and number > 2:
        gate_BN: Tensor = _Comparison.apply(logits_BN, chosen_B[:, None], None, size)
        return Decision(chosen_B, logits_BN, gate_BN, "all")
    if number == 2:
        other_B = 1 - chosen_B
    else:
        turn_B = positions(len(chosen_B), chosen_B.device) % (number - 1)  # batches are shuffled
        other_B = (chosen_B + 1 + turn_B) % number
    gate_BN = _Comparison.apply(logits_BN, chosen_B[:, None], other_B[:, None], size)
    return Decision(chosen_B, logits_BN, gate_BN, "sampled", other_B)


def scaled(y: Tensor, decision: Decision) -> Tensor:
    """The output y [B, ...] times the probability of the expert decided for, if the router says so (`value`)."""
    if not decision.scales:
        return y
    assert decision.logits_BN is not None
    probability_B1 = decision.logits_BN.softmax(dim=1).gather(1, decision.expert_index_B.unsqueeze(1))
    return y * probability_B1.reshape(-1, *[1] * (y.ndim - 1))


class RoutingTape:
    """Collects the routing decisions of one forward pass, or replays a given pathway.

    Args:
        routers: The network's routers.
        router_of_layer: Index of the router that decides for each MoE layer; a router decides once,
            on the input of the first layer that asks.
        forced_BL: Pathways to take instead of asking the routers, int64 [B, L].
    """

    def __init__(self, routers: nn.ModuleList, router_of_layer: Sequence[int], forced_BL: Tensor | None = None) -> None:
        self._routers = routers
        self._router_of_layer = router_of_layer
        self._forced_BL = forced_BL
        self._scales = any(router.scales for router in routers)
        self._decisions: dict[int, Decision] = {}

    def decide(self, layer: int, x_BCHW: Tensor) -> Decision:
        """The decision for MoE layer number `layer`, whose input is x."""
        if self._forced_BL is not None and not self._scales:
            return Decision(self._forced_BL[:, layer], None, None)
        router = self._router_of_layer[layer]
        if router not in self._decisions:
            decide: Callable[[Tensor], Decision] = self._routers[router].decide  # type: ignore[assignment]
            self._decisions[router] = decide(self.seen(x_BCHW))
        decision = self._decisions[router]
        if self._forced_BL is None:
            return decision
        # the router's probability of the given expert scales the output; layers with one router may differ
        return Decision(self._forced_BL[:, layer], decision.logits_BN, scales=decision.scales)

    def seen(self, x_BCHW: Tensor) -> Tensor:
        """The input of a router: the layer's input, as a constant.

        Routers learn from features, but do not shape them. Away from its boundaries the argmax has
        derivative zero, so the gradient that a gate would add to the experts, or to an attack, is
        not a derivative of the output. A probability that scales the output has a derivative.
        """
        return x_BCHW if self._scales else x_BCHW.detach()

    def apply(self, layer: int, x_BCHW: Tensor, compute: Callable[[Tensor, Decision], Tensor]) -> Tensor:
        """Output of MoE layer number `layer`: makes the decision, then calls `compute(input, decision)`.

        A tape with other routing (an attack's relaxation) overrides this method or `decide`. Layers
        need no change.
        """
        return compute(x_BCHW, self.decide(layer, x_BCHW))

    def read(self) -> Routing:
        """All decisions of the pass. Every layer must have asked before."""
        if self._forced_BL is not None:
            return Routing(self._forced_BL, None)
        decided = [self._decisions[router] for router in range(len(self._routers))]
        expert_index_BL = torch.stack([decided[router].expert_index_B for router in self._router_of_layer], dim=1)
        return Routing(expert_index_BL, torch.stack([d.logits_BN for d in decided if d.logits_BN is not None], dim=1))
