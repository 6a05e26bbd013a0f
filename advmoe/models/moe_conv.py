"""The MoE convolution: convolves every image with the filters of its own expert only.

The batch is dispatched (`advmoe.models.dispatch`): each expert convolves its images, and the
results return to batch order. The cost is that of one expert per image, also in training. A router
that learns adds the cost of one expert in the backward pass. Compiled passes, and those of two
experts on a GPU, compute all experts and select one instead (`computes_all`).

Shape suffixes: B batch, C channels, H height, N experts, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.errors import ConfigError
from advmoe.models import convolution
from advmoe.models.dispatch import (
    Order,
    computes_all,
    dtype_of_autocast,
    exporting,
    is_channels_last,
    router_signal,
    row_products,
    select,
    signal_of_values,
    uses_output,
    uses_tiles,
)
from advmoe.models.experts import ExpertLayout
from advmoe.models.first_order import first_order
from advmoe.models.routing import Decision, Signal
from advmoe.models.rows import Rows, exchanges, expert_rows, shares, split_rows, stretches

TOGETHER, ALONE = 128, 256
"""Rows to compare, per slot, times places, from which on a CPU gradients of filters by each image are cheaper than
convolutions with the differences of rows: where the gradients of the filters are wanted too, and where they are not
(docs/log.md)."""

HEAVY = 8
"""Numbers in all experts' filters, per number in the inputs, from which on a CPU shared rows are convolved once for all
their experts, instead of being copied for each (docs/log.md)."""


class Form(NamedTuple):
    """What all experts of a convolution have in common: the assignment of rows to experts, and the geometry."""

    rows: Rows
    stride: list[int]
    padding: list[int]


Filters = tuple[Tensor, Tensor | None]
"""Filters [S, C, kh, kw] and biases [S], if there are any."""


@dataclass(frozen=True, eq=False)
class Convolution:
    """The experts of a convolution (`advmoe.models.dispatch.Experts`)."""

    weight: Tensor
    bias: Tensor | None
    form: Form
    known: dict[int, Filters] = field(default_factory=dict)
    """Filters of the experts used so far. Where an expert's rows are not neighbors in the bank, they are copies."""

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.form.rows)

    def of(self, expert: int) -> Filters:
        """The filters and biases of one expert."""
        if expert not in self.known:
            self.known[expert] = self._rows(self.form.rows[expert])
        return self.known[expert]

    def output(self, expert: int, part: Tensor) -> Tensor:
        """One expert's convolution."""
        return self._convolve(part, *self.of(expert))

    @property
    def compared(self) -> float:
        """Rows that are convolved for a comparison of all experts, per slot."""
        return sum(len(exchange.rows) for exchange in exchanges(self.form.rows)) / len(self.form.rows[0])

    @property
    def comparison_pays(self) -> bool:
        """Whether `along_all` costs no more than one expert: the experts have few rows beside those of the first."""
        return self.compared <= 1

    def along_all(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Compute <gradient_b, y_e> for each image b and each expert e, [B, N], but for a constant of each image.

        A channel of several experts has the same slot in each of them, so that most experts share
        their differences from the first one (`advmoe.models.rows.exchanges`).
        """
        if not self.comparison_pays and _goes_by_image(gradient, self.compared, ALONE):
            return self.by_image(x, gradient, x.new_empty(0, len(x)))[0]
        value_NB = x.new_zeros(self.num_experts, len(x))
        for exchange in exchanges(self.form.rows):
            new, old = (self._rows(rows) for rows in (exchange.rows, exchange.instead_of))
            changes, place = self._convolve(x, *_distance(new, old)), 0
            for slots in exchange.slots:
                change, place = changes[:, place : place + slots.size], place + slots.size
                product_B = row_products(gradient[:, slots.start : slots.stop], change)
                for expert in slots.experts:
                    value_NB[expert] += product_B
        return value_NB.T

    def joint_pays(self, y: Tensor, signal: Signal) -> bool:
        """Whether one call of `by_image` is cheaper than a router's signal and the gradients of the filters apart.

        Not in half precision, in which the gradients of single images would be rounded before they
        are summed.
        """
        if signal == "own" or y.dtype in (torch.bfloat16, torch.float16):
            return False
        return _goes_by_image(y, self.compared if signal == "all" else min(self.compared, 1.0), TOGETHER)

    def by_image(self, x: Tensor, gradient: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what follows from dL/dW_b, the gradient of the filters by image b alone.

        <gradient_b, y_e> equals <dL/dW_b, W_e>. Where feature maps are large, this costs about as
        much as one or two convolutions, for all N experts together.

        Args:
            x: Inputs, [B, C, H, W].
            gradient: Gradient of the loss by the outputs, [B, S, H', W'].
            members: Which images belong together, 1 or 0, [G, B].

        Returns:
            <gradient_b, y_e - mean of all experts' outputs>, [B, N], and the sum of dL/dW_b over the
            images of each row of `members`, [G, S, C, kh, kw].
        """
        banks = [self.of(expert) for expert in range(self.num_experts)]
        filters = banks[0][0]
        all_filters = _centered([own.flatten() for own, _ in banks])
        precise = torch.promote_types(x.dtype, torch.float32)  # the pieces are summed one by one
        value_NB = x.new_zeros(len(banks), len(x), dtype=precise)
        sums = x.new_zeros(len(members), filters.numel())
        for images, columns, values in convolution.gradients_of_filters(
            gradient, x, filters, self.form.stride, self.form.padding
        ):
            value_NB[:, images] += all_filters[:, columns] @ values.T  # twice as fast as its transpose
            sums[:, columns].addmm_(members[:, images], values)
        value_BN = value_NB.T
        biases = [bias for _, bias in banks if bias is not None]
        if biases:
            value_BN = value_BN + gradient.sum(dim=(2, 3)) @ _centered(biases).T
        return value_BN, sums.unflatten(1, filters.shape)

    def along_advantage(self, order: Order, x: Tensor, gradient: Tensor) -> Tensor:
        """Computed by convolutions with differences of filters."""
        banks = [self.of(expert) for expert in range(self.num_experts)]
        mean = _mean(banks)
        products = []
        for expert, part, part_gradient in zip(order.present, order.split(x), order.split(gradient), strict=True):
            products.append(row_products(part_gradient, self._convolve(part, *_distance(banks[expert], mean))))
        return torch.cat(products)

    def all_outputs(self, x: Tensor) -> Sequence[Tensor]:
        """All experts' outputs for all images, by one convolution."""
        everyone = tuple(chain.from_iterable(self.form.rows))
        bias = None if self.bias is None else expert_rows(self.bias, everyone)
        return self._convolve(x, expert_rows(self.weight, everyone), bias).chunk(self.num_experts, dim=1)

    def gradients(
        self, expert: int, part: Tensor, gradient: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Any, Any, Any]:
        """Gradients of one expert's convolution by its input, filters and bias, as far as wanted."""
        (filters, _), form = self.of(expert), self.form
        return convolution.gradients(gradient, part, filters, form.stride, form.padding, wanted)

    def of_banks(
        self, order: Order, of_filters: Sequence[Tensor], of_biases: Sequence[Tensor], wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the banks of filters and biases as far as wanted, from those of the experts that have images."""
        rows, present = self.form.rows, order.present
        return (
            _bank_gradient(self.weight, rows, present, of_filters) if wanted[0] else None,
            _bank_gradient(self.bias, rows, present, of_biases) if wanted[1] and self.bias is not None else None,
        )

    def shares_pay(self, order: Order, x: Tensor) -> bool:
        """Whether shared rows are better convolved with the images of all their experts than expert by expert."""
        rows, numbers = self.form.rows, self.weight[0].numel() * len(self.form.rows[0]) * len(order.present)
        if order.alone or not x.is_cpu or is_channels_last(x) or numbers < HEAVY * x.numel():
            return False
        return sum(share.stop - share.start for share in shares(rows)) < len(rows) * len(rows[0])

    def output_by_shares(self, order: Order, x: Tensor) -> Tensor:
        """Outputs [B, S, H', W'] of a sorted batch."""
        y = None
        for share in shares(self.form.rows):
            filters, bias = self.weight[share.rows], None if self.bias is None else self.bias[share.rows]
            for images in order.stretches(share.experts):
                part = self._convolve(x[images], filters, bias)
                if y is None:
                    y = part.new_empty(len(x), len(self.form.rows[0]), *part.shape[2:])
                y[images, share.slots] = part
        assert y is not None
        return y

    def gradients_by_shares(
        self, order: Order, x: Tensor, gradient: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients by the inputs of a sorted batch, and by the whole banks of filters and biases, as far as wanted."""
        of_all = [
            torch.zeros_like(each) if want and each is not None else None
            for each, want in zip((x, self.weight, self.bias), wanted, strict=True)
        ]
        for share in shares(self.form.rows):
            filters = self.weight[share.rows]
            for images in order.stretches(share.experts):
                part = gradient[images, share.slots]
                found = convolution.gradients(part, x[images], filters, self.form.stride, self.form.padding, wanted)
                for total, place, each in zip(of_all, (images, share.rows, share.rows), found, strict=True):
                    if total is not None:
                        total[place] += each
        return of_all[0], of_all[1], of_all[2]

    def _rows(self, rows: tuple[int, ...]) -> Filters:
        return expert_rows(self.weight, rows), None if self.bias is None else expert_rows(self.bias, rows)

    def _convolve(self, part: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        form = self.form
        return F.conv2d(part, filters, bias, form.stride, form.padding)


def _goes_by_image(y: Tensor, compared: float, enough: int) -> bool:
    """Whether gradients of filters by each image are computed, for outputs or gradients like y."""
    return y.is_cpu and len(y) > 0 and compared * y.shape[2] * y.shape[3] >= enough


def _centered(values: Sequence[Tensor]) -> Tensor:
    """Values of all experts less their mean, one row for each. Differences of similar experts keep their digits."""
    return torch.stack(list(values)) - _average(values)


def _mean(banks: Sequence[Filters]) -> Filters:
    """Filters and biases of the mean expert."""
    biases = [bias for _, bias in banks if bias is not None]
    return _average([filters for filters, _ in banks]), _average(biases) if biases else None


def _average(values: Sequence[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total.div_(len(values))


def _distance(of: Filters, other: Filters) -> Filters:
    """Filters and biases of one expert minus those of another."""
    return of[0] - other[0], None if of[1] is None or other[1] is None else of[1] - other[1]


class _RoutedConvolution(torch.autograd.Function):
    """The routed convolution as one node of autograd. Its backward pass computes only the gradients that are needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, decision: Decision, form: Form
    ) -> Tensor:
        experts = Convolution(weight, bias, form)
        order = Order.of(decision.expert_index_B, experts.num_experts)
        sorted_x = order.sort(x)
        ctx.by_shares = experts.shares_pay(order, x)
        if ctx.by_shares:
            parts = order.split(experts.output_by_shares(order, sorted_x))
        else:
            split = zip(order.present, order.split(sorted_x), strict=True)
            parts = [experts.output(expert, part) for expert, part in split]
        y = order.combine(parts)
        ctx.order, ctx.decision, ctx.form = order, decision._replace(logits_BN=None, gate=None), form
        ctx.known = experts.known  # autograd watches the bank, of which they are copies
        _, of_weight, _, of_gate = ctx.needs_input_grad[:4]
        needs_x = of_weight or (of_gate and decision.signal != "own")
        ctx.joint = of_weight and of_gate and experts.joint_pays(y, decision.signal)
        needs_y = of_gate and not ctx.joint and uses_output(decision.signal, experts)
        # if the values of x are not needed, any tensor of its form will do, and x costs no memory
        ctx.save_for_backward(sorted_x if needs_x else x, weight, bias, y if needs_y else None)
        ctx.layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
        ctx.gate_dtype = None if gate is None else gate.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_gate = ctx.needs_input_grad[:4]
        order, experts = ctx.order, Convolution(weight, bias, ctx.form, ctx.known)
        gradient = gradient.contiguous(memory_format=ctx.layout)
        sorted_gradient = order.sort(gradient)
        of_x: Sequence[Tensor] = ()
        of_banks: Sequence[Tensor | None] = (None, None)
        of_gate = None
        joint = ctx.joint and (needs_weight or needs_gate)
        wanted = (needs_x, needs_weight and not joint, needs_bias and not joint)
        if any(wanted) and ctx.by_shares:
            of_all, *of_banks = experts.gradients_by_shares(order, x, sorted_gradient, wanted)
            of_x = () if of_all is None else order.split(of_all)
        elif any(wanted):
            parts = zip(order.present, order.split(x), order.split(sorted_gradient), strict=True)
            found = [experts.gradients(expert, part, own, wanted) for expert, part, own in parts]
            of_x, of_filters, of_biases = zip(*found, strict=True)
            of_banks = experts.of_banks(order, of_filters, of_biases, wanted[1:])
        if joint:
            members = order.members(x)
            value_BN, sums = experts.by_image(x, sorted_gradient, members)
            of_gate = signal_of_values(ctx.decision, order.combine(order.split(value_BN)))
            of_biases = tuple(members @ sorted_gradient.sum(dim=(2, 3))) if needs_bias else ()
            of_banks = experts.of_banks(order, tuple(sums), of_biases, (needs_weight, needs_bias))
        elif needs_gate:
            products_B = None if y is None else row_products(gradient, y)
            of_gate = router_signal(ctx.decision, experts, order, x, products_B, sorted_gradient)
        return (
            order.combine(of_x) if needs_x else None,
            *of_banks,
            None if of_gate is None else of_gate.to(ctx.gate_dtype),
            None,
            None,
        )


def _bank_gradient(bank: Tensor, rows: Rows, present: Sequence[int], gradients: Sequence[Tensor]) -> Tensor:
    """The gradient of a bank, from the gradients of the experts that had images."""
    of_experts = dict(zip(present, gradients, strict=True))
    if stretches(tuple(chain.from_iterable(rows))) == ((0, len(bank)),):  # nothing is shared: one copy
        size = len(rows[0])
        return torch.cat([of_experts.get(e, bank.new_zeros(size, *bank.shape[1:])) for e in range(len(rows))])
    gradient = torch.zeros_like(bank)
    for expert, of_expert in of_experts.items():
        place = 0
        for start, stop in stretches(rows[expert]):
            gradient[start:stop] += of_expert[place : place + stop - start]
            place += stop - start
    return gradient


def _routed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, decision: Decision, form: Form) -> Tensor:
    dtype = dtype_of_autocast(x.device.type)
    if dtype is not None:  # autograd records casts here, but not inside the node
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if decision.alone is not None and x.is_cuda:
        return Convolution(weight, bias, form).output(decision.alone, x)
    if uses_tiles():
        return _tiled(x, weight, bias, decision, form)
    if computes_all(x, len(form.rows)):
        experts = Convolution(weight, bias, form)
        return select(experts.all_outputs(x), decision)
    y: Tensor = _RoutedConvolution.apply(x, weight, bias, decision.gate, decision, form)
    return y


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None, decision: Decision, form: Form) -> Tensor:
    from advmoe.models.tiles import Geometry, tiled_convolution  # needs Triton, which not every machine has

    experts = Convolution(weight, bias, form)
    banks = [experts.of(expert) for expert in range(experts.num_experts)]
    biases = [own for _, own in banks if own is not None]
    return tiled_convolution(
        x,
        torch.stack([filters for filters, _ in banks]),
        torch.stack(biases) if biases else None,
        decision,
        Geometry(form.stride[0], form.padding[0]),
    )


def check_tiles(device: torch.device) -> None:
    """Convolve one number by tiles, forward and backward, because Triton compiles its kernels only when they start.

    Raises:
        ConfigError: Triton is not installed, or its kernels do not compile or start on this machine.
    """
    try:
        from advmoe.models.tiles import Geometry, convolve, filter_gradient, input_gradient

        x, bank = torch.ones(1, 1, 1, 1, device=device), torch.ones(1, 1, 1, 1, 1, device=device)
        expert_B, geometry = torch.zeros(1, dtype=torch.int64, device=device), Geometry(1, 0)
        y = convolve(x, bank, expert_B, geometry)
        input_gradient(y, bank, expert_B, x, geometry)
        filter_gradient(y, x, expert_B, bank, geometry)
    except Exception as error:  # Triton reports what a machine lacks by exceptions of many kinds
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConfigError(
            f"dispatch tiles needs Triton, and a C compiler for its kernels, but they do not run here: {reason}; mend "
            "that, or use dispatch auto",
            "dispatch",
        ) from error


# An exporter sees this operator as one node. Its kernel is the function above. In eager mode,
# `moe_conv2d` below calls the function itself, so that autograd sees its node. A schema has no list
# of lists: `rows` concatenates the rows of all experts, and `size` is the number of rows of each.
_operator = torch.library.custom_op(
    "advmoe::moe_conv2d",
    lambda x, weight, bias, expert_index, rows, size, *geometry: _routed_convolution(
        x, weight, bias, Decision(expert_index, None), Form(split_rows(rows, size), *geometry)
    ).clone(),
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor expert_index, int[] rows, int size, int[] stride, "
        "int[] padding) -> Tensor"
    ),
)


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    rows: Sequence[int],
    size: int,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    return F.conv2d(x, weight[:size], None if bias is None else bias[:size], list(stride), list(padding))


def moe_conv2d(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    decision: Decision | Tensor,
    *,
    rows: Rows,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Convolve image b with the filters of the expert chosen for it.

    Args:
        x_BCHW: Layer input.
        weight: Weight bank [bank, C, kh, kw]; expert e convolves with its rows rows[e].
        bias: Bias bank [bank] or None, shared out in the same way.
        decision: The experts chosen, with a gate where a router learns; or just the experts, int64
            [B], each one of range(len(rows)).
        rows: Bank rows of each expert, in the order of its output channels.
        stride: Stride as in `torch.nn.functional.conv2d`, the same in both directions.
        padding: Zeros added on each side, in both directions.

    Returns:
        [B, len(rows[0]), H', W'], in batch order.
    """
    if isinstance(decision, Tensor):
        decision = Decision(decision, None)
    form = Form(rows, [stride] * 2, [padding] * 2)
    if exporting():
        flat = list(chain.from_iterable(rows))
        y_BCHW: Tensor = torch.ops.advmoe.moe_conv2d(
            x_BCHW, weight, bias, decision.expert_index_B, flat, len(rows[0]), *form[1:]
        )
        return y_BCHW
    return _routed_convolution(x_BCHW, weight, bias, decision, form)


class ExpertAffine(nn.Module):
    """A scale and a shift for each expert and filter, stored as differences from 1 and 0. Experts start equal."""

    def __init__(self, num_experts: int, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_experts, size))
        self.shift = nn.Parameter(torch.zeros(num_experts, size))


class MoEConv2d(nn.Module):
    """A convolution whose filters are divided among experts (paper, Sec. 3). The caller provides the decision."""

    def __init__(
        self,
        in_channels: int,
        layout: ExpertLayout,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = layout.size
        self.layout = layout
        self.stride = stride
        self.padding = padding
        self.rows = layout.rows
        self.weight = nn.Parameter(torch.empty(len(layout.bank_channels), in_channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.bias: nn.Parameter | None = None
        self.affine = ExpertAffine(layout.num_experts, layout.size) if affine else None

    def bank(self) -> tuple[Tensor, Tensor | None, Rows]:
        """Filters and biases of all experts and the rows of each, after the scale and shift of each
        expert if there are any.
        """
        if self.affine is None:
            return self.weight, self.bias, self.rows
        every = torch.cat([expert_rows(self.weight, rows) for rows in self.rows])
        weight = every * (1.0 + self.affine.scale.flatten())[:, None, None, None]
        return weight, self.affine.shift.flatten(), split_rows(range(len(every)), self.out_channels)

    def fold_affine(self) -> None:
        """Apply each expert's scale and shift to its own copy of the shared filters."""
        weight, bias, self.rows = self.bank()
        if self.affine is not None and bias is not None:
            self.weight, self.bias, self.affine = nn.Parameter(weight.detach()), nn.Parameter(bias.detach()), None

    def forward(self, x_BCHW: Tensor, decision: Decision) -> Tensor:
        """Output of each image's expert, [B, size, H', W'], in the expert's own (packed) channel order."""
        weight, bias, rows = self.bank()
        return moe_conv2d(x_BCHW, weight, bias, decision, rows=rows, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        layout = self.layout
        return (
            f"{self.in_channels}, {self.out_channels} of {layout.num_channels}, experts={layout.num_experts}, "
            f"kernel_size={self.weight.shape[-1]}, stride={self.stride}, padding={self.padding}"
        )
