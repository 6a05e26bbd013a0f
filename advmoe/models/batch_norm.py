"""BatchNorm whose batch is the union of all ranks' batches.

With one process this is torch's own BatchNorm, bit for bit. With several ranks, the statistics,
their gradients and the running statistics equal those of one process on the union batch. torch's
SyncBatchNorm does the same, but on GPUs only. Its conversion would also replace the routers'
centering, which is no BatchNorm.

Shape suffixes: B batch, C channels, G ranks, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advmoe.distributed import stack_all, sum_up, world
from advmoe.models.first_order import first_order


def union_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number [] of the values of each channel (axis 1) over all ranks' x.

    Ranks may have different numbers of images, also none.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    own = x.detach()
    if own.dtype in (torch.float16, torch.bfloat16):
        own = own.float()
    count = own.numel() // own.shape[1]
    if count:
        var_C, mean_C = torch.var_mean(own, axes, correction=0)
    else:
        var_C = mean_C = own.new_zeros(own.shape[1])
    stacked_G2C = stack_all(torch.cat((mean_C, var_C, own.new_full((1,), count))))
    means_GC, vars_GC, counts_G1 = stacked_G2C.tensor_split([len(mean_C), 2 * len(mean_C)], dim=1)
    number = counts_G1.sum()
    mean_C = (means_GC * counts_G1).sum(dim=0) / number
    # Chan et al. (1983): no difference of large sums, unlike E[x^2] - E[x]^2.
    squares_C = ((vars_GC + (means_GC - mean_C).square()) * counts_G1).sum(dim=0)
    return mean_C, squares_C / number, number


def take_in(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean_C: Tensor, var_C: Tensor, number: Tensor, weight: Any) -> None:
    """Move the running statistics by `weight` towards those of a batch, the variance as an unbiased estimate.

    A single value has no variance, so it changes nothing.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        for running, value in ((norm.running_mean, mean_C), (norm.running_var, var_C * (number / (number - 1)))):
            running.lerp_(torch.where(number > 1, value.to(running.dtype), running), weight)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, number: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, number)
        ctx.eps = eps
        y: Tensor = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, number = ctx.saved_tensors
        (gradient_y,) = gradients
        rstd = (var + ctx.eps).rsqrt()
        # Gradient with mean and var as constants. Some kernels of GPUs need the saved statistics, too.
        if x.numel():
            gradient_x, gradient_weight, gradient_bias = torch.ops.aten.native_batch_norm_backward(
                gradient_y, x, weight, mean, var, mean, rstd, False, ctx.eps, [True, True, True]
            )
        else:  # a rank without images; the operator would divide by their number
            gradient_x, gradient_weight, gradient_bias = (torch.zeros_like(each) for each in (x, weight, weight))
        # Gradient through mean and var: - weight / std * (mean of gradient + normalized x * mean of
        # (gradient * normalized x)).
        of_bias, of_weight = gradient_bias.clone(), gradient_weight.clone()
        sum_up([of_bias, of_weight])
        slope = weight * rstd.square() * of_weight / number
        shift = weight * rstd * of_bias / number - slope * mean
        across = (-1, *[1] * (x.ndim - 2))
        gradient_x = gradient_x - torch.addcmul(shift.view(across), x, slope.view(across))
        return gradient_x.to(x.dtype), gradient_weight, gradient_bias, None, None, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d; in training with several ranks, over the union of their batches."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if not self.training or world().size == 1:
            return super().forward(x_BCHW)
        mean_C, var_C, number = union_statistics(x_BCHW)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            take_in(self, mean_C, var_C, number, self.momentum)
        y_BCHW: Tensor = _Normalize.apply(x_BCHW, self.weight, self.bias, mean_C, var_C, number, self.eps)
        return y_BCHW
