"""The training objectives.

Shape suffixes: B batch, K classes, N experts, R routers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.distributed import Place
from advmoe.models.routing import Routing
from advmoe.training.union import mean_over_union


def trades(clean_logits_BK: Tensor, adversarial_logits_BK: Tensor, labels_B: Tensor, beta: float) -> Tensor:
    """CE(f(x), y) + beta * KL(f(x) || f(x')), averaged over the batch (paper, eq. AT, with beta = 1 / lambda).

    Gradients flow through both arguments of the KL. Both are kept in log space: with a softmax
    target that underflows, 0 * log 0 makes the gradient NaN.
    """
    natural = F.cross_entropy(clean_logits_BK, labels_B)
    robust = F.kl_div(
        adversarial_logits_BK.log_softmax(dim=1),
        clean_logits_BK.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return natural + beta * robust


def load_balance(routing: Routing, place: Place | None = None, rows_per_image: int = 1) -> Tensor:
    """N * sum_e f_e * p_e, averaged over routers (Fedus et al., 2022, eq. 4): 1 at perfect balance.

    It is above 1 where the experts that are chosen most also have the largest probabilities, as usual.
    f_e is the share of images that router sends to expert e (constant), p_e the mean of its
    softmax. Of a router of tokens, both are means over all tokens of all images, `rows_per_image`
    of each: a position of tokens may prefer an expert. With several ranks both are means over the
    union of their batches, in which the batch has its `place`.
    """
    logits_BRN = routing.logits_BRN
    assert logits_BRN is not None
    num_experts = logits_BRN.shape[2]
    share_RN = mean_over_union(F.one_hot(logits_BRN.argmax(dim=2), num_experts).to(logits_BRN.dtype), place)
    probability_RN = mean_over_union(logits_BRN.softmax(dim=2), place)
    of_routers = [means.unflatten(0, (-1, rows_per_image)).mean(dim=1) for means in (share_RN, probability_RN)]
    return num_experts * torch.sum(of_routers[0] * of_routers[1], dim=1).mean()
