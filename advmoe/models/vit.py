"""ViT-S (Dosovitskiy et al., 2021; Touvron et al., 2021) whose MLPs are experts: MoE-ViT (paper, Table 3).

The MLP of each block is routed: expert e is a window of r of its hidden units. Attention, patch
embedding and classifier are not routed, and r does not narrow them. S-Dense is therefore a ViT with
narrower MLPs, equal to one pathway of MoE-ViT.

Shape suffixes: B batch, C channels, D features, H height, T tokens, U routed units (an image or a
token), W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig, check
from advmoe.models.channels import Channels
from advmoe.models.dispatch import Order, exporting, route, row_products
from advmoe.models.experts import ExpertLayout
from advmoe.models.layers import IMAGENET_SIZE, LayerFactory, Linear
from advmoe.models.moe_linear import MoELinear
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Decision, RoutingTape, scaled
from advmoe.models.rows import split_rows

DEPTH = 12
HEADS = 6
HEAD_DIM = 64
"""Dimension of a head before the width multiplier."""
MLP_RATIO = 4
"""Hidden units of an MLP per dimension of a token."""
NORM_EPS = 1e-6


def patch_size(image_size: int) -> int:
    """4 pixels for CIFAR, 8 for TinyImageNet (64 tokens both), 16 for ImageNet."""
    if image_size >= IMAGENET_SIZE:
        return 16
    return 8 if image_size >= 64 else 4


def init_linear(layer: nn.Module, outputs: int | None = None) -> None:
    """The initialization of torchvision's ViT, for a layer or for a bank of layers with so many outputs each."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    std = math.sqrt(2.0 / (weight.shape[1] + (len(weight) if outputs is None else outputs)))  # Xavier
    nn.init.uniform_(weight, -math.sqrt(3.0) * std, math.sqrt(3.0) * std)
    nn.init.normal_(layer.bias, std=1e-6)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: Channels) -> None:
        super().__init__()
        self.qkv = Linear(dim, Channels(3 * dim.full, 3 * dim.size))
        self.out = Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q_BHTd, k_BHTd, v_BHTd = self.qkv(x_BTD).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd)
        y_BTD: Tensor = self.out(y_BHTd.transpose(1, 2).flatten(2))
        return y_BTD


class MLP(nn.Module):
    """Linear, GELU, linear; the same weights for all tokens."""

    def __init__(self, dim: Channels, hidden: Channels) -> None:
        super().__init__()
        self.expand = Linear(dim, hidden)
        self.reduce = Linear(hidden, dim)
        init_linear(self.expand)
        init_linear(self.reduce)

    def forward(self, x_BTD: Tensor, tape: RoutingTape) -> Tensor:
        """[B, T, D] -> [B, T, D]; the tape is not needed."""
        y_BTD: Tensor = self.reduce(F.gelu(self.expand(x_BTD)))
        return y_BTD


class RoutedMLP(nn.Module):
    """N experts, each a window of the hidden units with output weights of its own.

    Args:
        layer: Number of this MoE layer.
        dim: Dimension of a token, D.
        layout: Division of the hidden units among the experts.
        per_token: Each token picks its expert, instead of all tokens of an image together.
    """

    def __init__(self, layer: int, dim: int, layout: ExpertLayout, *, per_token: bool) -> None:
        super().__init__()
        self.layer = layer
        self.per_token = per_token
        experts = layout.num_experts
        self.expand = MoELinear(dim, len(layout.bank_channels), layout.rows)
        self.reduce = MoELinear(layout.size, experts * dim, split_rows(range(experts * dim), dim))
        init_linear(self.expand, layout.size)  # each expert starts as S-Dense does, whatever N is
        init_linear(self.reduce, dim)

    def forward(self, x_BTD: Tensor, tape: RoutingTape) -> Tensor:
        """[B, T, D] -> [B, T, D]. The router sees rows as feature maps [U, D, T, 1]."""
        rows_UTD = x_BTD.flatten(0, 1).unsqueeze(1) if self.per_token else x_BTD
        y_UDT1 = tape.apply(self.layer, rows_UTD.transpose(1, 2).unsqueeze(3), self.compute)
        y_BTD: Tensor = y_UDT1.squeeze(3).transpose(1, 2).reshape(x_BTD.shape)
        return y_BTD

    def compute(self, x_UDT1: Tensor, decision: Decision) -> Tensor:
        """Output of each row's expert, as feature maps [U, D, T, 1]."""
        x_UTD = x_UDT1.squeeze(3).transpose(1, 2)
        index_U = decision.expert_index_B
        if exporting():
            y_UTD: Tensor = self.reduce(F.gelu(self.expand(x_UTD, index_U)), index_U)
        else:  # computes both layers of an expert at once: one dispatch instead of two
            y_UTD = route(x_UTD, decision, self)
        y_UTD = scaled(y_UTD, decision)
        return y_UTD.transpose(1, 2).unsqueeze(3)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.expand.num_experts

    @property
    def comparison_pays(self) -> bool:
        """Whether `along_all` costs one other expert."""
        return self.num_experts == 2

    def output(self, expert: int, part: Tensor) -> Tensor:
        """Output of one expert for rows [b, T, D]."""
        return self.reduce.one_expert(expert, F.gelu(self.expand.one_expert(expert, part)))

    def along_all(self, x: Tensor, gradient: Tensor) -> Tensor:
        """<gradient, output of each expert less that of the first> of each row, [U, N]."""
        first = self.output(0, x)
        changes = (self.output(expert, x) - first for expert in range(1, self.num_experts))
        zeros_U = gradient.new_zeros(len(x))
        return torch.stack([zeros_U, *[row_products(gradient, change) for change in changes]], dim=1)

    def along_advantage(self, order: Order, x: Tensor, gradient: Tensor) -> Tensor:
        """<gradient, own output - mean of all experts' outputs> of each row of a sorted batch."""
        products = []
        for expert, part, part_gradient in zip(order.present, order.split(x), order.split(gradient), strict=True):
            outputs = torch.stack([self.output(each, part) for each in range(self.num_experts)])
            products.append(row_products(part_gradient, outputs[expert] - outputs.mean(dim=0)))
        return torch.cat(products)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, layers: LayerFactory, dim: Channels) -> None:
        super().__init__()
        layers.begin("block")
        self.norm1 = nn.LayerNorm(dim.size, eps=NORM_EPS)
        self.attention = Attention(dim)
        self.norm2 = nn.LayerNorm(dim.size, eps=NORM_EPS)
        hidden = layers.channels(MLP_RATIO * dim.full / layers.config.width)
        if layers.routes:
            layer = layers.routed(dim.size, hidden.full)
            per_token = layers.config.granularity == "token"
            self.mlp: nn.Module = RoutedMLP(layer, dim.size, layers.layouts[layer], per_token=per_token)
        else:
            self.mlp = MLP(dim, hidden)

    def forward(self, x_BTD: Tensor, tape: RoutingTape) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        y_BTD: Tensor = x_BTD + self.mlp(self.norm2(x_BTD), tape)
        return y_BTD


class ViT(RoutedNetwork):
    """ViT-S: 12 blocks (or `depth`), 6 heads, 384 dimensions, a class token and learned positions.

    All blocks have the same shape, so the whole encoder is one stage. The granularity `token`
    exists in addition to those of the CNNs: each token picks its own expert.
    """

    def __init__(self, config: ModelConfig) -> None:
        size, patch = config.image_size, patch_size(config.image_size)
        check(config.kind != "sparse_cnn", "vit has no channels to prune; use kind dense, s_dense or moe, or a CNN")
        nearest = max(patch, round(size / patch) * patch)
        check(
            size % patch == 0, f"vit cuts images into patches of {patch} pixels, got {size}; the nearest is {nearest}"
        )
        layers = LayerFactory(config, stages=1, blocks=config.depth or DEPTH)
        super().__init__(config, layers)
        number = HEADS * max(1, int(HEAD_DIM * config.width + 0.5))
        dim = Channels(number, number)
        tokens = (size // patch) ** 2 + 1
        if config.kind == "moe" and config.granularity == "token":
            self.rows_per_image = tokens
        self.patches = nn.Conv2d(3, number, patch, stride=patch)
        nn.init.trunc_normal_(self.patches.weight, std=(3 * patch**2) ** -0.5)
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        self.class_token = nn.Parameter(torch.zeros(1, 1, number))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, number))
        layers.begin("stage")
        self.blocks = nn.ModuleList(Block(layers, dim) for _ in range(config.depth or DEPTH))
        self.norm = nn.LayerNorm(number, eps=NORM_EPS)
        self.classifier = Linear(dim, layers.classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalized images."""
        patches_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BTD = torch.cat((self.class_token.expand(x_BCHW.shape[0], -1, -1), patches_BTD), dim=1) + self.positions
        for block in self.blocks:
            x_BTD = block(x_BTD, tape)
        logits: Tensor = self.classifier(self.norm(x_BTD[:, 0]))
        return logits
