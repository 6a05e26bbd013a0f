"""The training objectives."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def trades(clean_logits_BK: Tensor, adversarial_logits_BK: Tensor, labels_B: Tensor, beta: float) -> Tensor:
    """CE(f(x), y) + beta * KL(f(x) || f(x')), averaged over the batch (paper, eq. AT, with beta = 1 / lambda).

    Gradients flow through both arguments of the KL. Both are kept in log space: with a softmax target that underflows,
    0 * log 0 makes the gradient NaN.
    """
    natural = F.cross_entropy(clean_logits_BK, labels_B)
    robust = F.kl_div(
        adversarial_logits_BK.log_softmax(dim=1),
        clean_logits_BK.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return natural + beta * robust
