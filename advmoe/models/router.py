"""Routers: small gating networks that pick one expert per image.

Shape suffixes: B batch, C channels, H height, N experts, W width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from advmoe.config import RouterGradient
from advmoe.distributed import world
from advmoe.models.batch_norm import BatchNorm2d, take_in, union_statistics
from advmoe.models.dispatch import dtype_of_autocast, exporting
from advmoe.models.routing import Decision, compared, gate


def in_full(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off, so that routers compute in fp32 where the network computes in bf16."""
    device = x.device.type
    return nullcontext() if dtype_of_autocast(device) is None else torch.autocast(device, enabled=False)


class Centering(nn.BatchNorm1d):
    """Standardizes features by running statistics, also in training. A decision then depends on its image alone.

    The training attack, the following update and the finished model therefore decide alike on equal
    features. With batch statistics, a router in training would not even see a shift that the attack
    gives to all images.
    """

    NEWEST = 0.1
    """Weight of the newest batch. The first 1 / NEWEST batches have equal weights."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)

    def forward(self, features_BC: Tensor) -> Tensor:
        """[B, C] -> [B, C] by the stored statistics. In training mode, the batch updates them afterwards."""
        if not self.training:
            return super().forward(features_BC)
        assert self.running_mean is not None
        assert self.running_var is not None
        standardized_BC = (features_BC - self.running_mean) * (self.running_var + self.eps).rsqrt()
        with torch.no_grad():
            if world().size > 1:
                mean_C, variance_C, number = union_statistics(features_BC)
                take_in(self, mean_C, variance_C, number, self._weight(number > 1))
            elif len(features_BC) > 1:  # one image has no variance
                weight = self._weight(1)
                variance_C, mean_C = torch.var_mean(features_BC, dim=0)
                self.running_mean.lerp_(mean_C, weight)
                self.running_var.lerp_(variance_C, weight)
        return standardized_BC

    def _weight(self, counts: Tensor | int) -> Tensor:
        """The weight of a new batch, if it counts. Unlike in BatchNorm, the host does not read it."""
        assert self.num_batches_tracked is not None
        assert self.running_var is not None
        self.num_batches_tracked += counts
        return self.num_batches_tracked.reciprocal().clamp(self.NEWEST, 1.0).to(self.running_var.dtype)


class Router(nn.Module):
    """Global average pool -> centering -> linear without bias -> N logits.

    The pooled features of a ReLU network are positive and share one large direction. A plain linear
    router therefore sends every image to the same expert within a few epochs. Centering removes
    that direction. There is no bias, so every logit has mean zero over the data, and no expert can
    win everywhere.
    """

    def __init__(self, in_channels: int, num_experts: int, *, router_gradient: RouterGradient = "dense") -> None:
        super().__init__()
        self.router_gradient = router_gradient
        self.scales = router_gradient == "value"
        self.center = Centering(in_channels)
        self.linear = nn.Linear(in_channels, num_experts, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, N] for the layer input."""
        dtype = self.linear.weight.dtype
        with in_full(x_BCHW):
            # sums bf16 numbers in fp32; exporters expect the plain form
            pooled_BC = x_BCHW.mean(dim=(2, 3)) if x_BCHW.dtype == dtype else x_BCHW.mean(dim=(2, 3), dtype=dtype)
            logits: Tensor = self.linear(self.center(pooled_BC))
        return logits

    def decide(self, x_BCHW: Tensor) -> Decision:
        """The expert of each image (the first of equal logits), with a gate if this router is being trained."""
        logits_BN = self(x_BCHW)
        expert_index_B = logits_BN.argmax(dim=1)
        learns = self.training and logits_BN.requires_grad and not exporting()
        if not learns or self.scales:
            return Decision(expert_index_B, logits_BN, scales=self.scales)
        if logits_BN.shape[1] == 1:  # nothing to compare with
            return Decision(expert_index_B, logits_BN, gate(logits_BN, expert_index_B, "softmax"))
        if self.router_gradient in {"dense", "sampled", "relative"}:
            kind = self.router_gradient
            return compared(expert_index_B, logits_BN, sampled=kind == "sampled", relative=kind == "relative")
        gate_B = gate(logits_BN, expert_index_B, self.router_gradient)
        return Decision(expert_index_B, logits_BN, gate_B, "mean" if self.router_gradient == "advantage" else "own")


class ImageRouter(Router):
    """A small CNN on the normalized image that decides for the whole network (the released code's granularity)."""

    def __init__(self, num_experts: int, *, router_gradient: RouterGradient = "dense") -> None:
        super().__init__(64, num_experts, router_gradient=router_gradient)
        self.features = nn.Sequential()
        for in_channels, out_channels in ((3, 16), (16, 32), (32, 64)):
            self.features.extend(
                (
                    nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
                    BatchNorm2d(out_channels),
                    nn.ReLU(),
                )
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, N] for images [B, 3, H, W]."""
        with in_full(x_BCHW):
            return super().forward(self.features(x_BCHW))
