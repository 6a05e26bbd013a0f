"""Channel spaces: the channels that layers write and read, and those of them that a Sparse-CNN keeps.

Layers whose outputs are added (a residual stream) write the same channels. One mask therefore
prunes them together, and the kept channels fit into a small dense network.

Shape suffixes: C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ChannelMask(nn.Module):
    """A learned choice of `kept` channels: those with the highest scores (HYDRA, Sehwag et al., 2020, for channels).

    The mask is 1 for kept channels and 0 for the others; its gradient passes straight through to
    the scores. While it is `open` all channels are kept: the network is Dense.
    """

    open: Tensor

    def __init__(self, full: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.scores = nn.Parameter(torch.rand(full))
        self.register_buffer("open", torch.tensor(False))

    def forward(self) -> Tensor:
        """The mask [C], with values 0 and 1."""
        mask_C = torch.zeros_like(self.scores).index_fill(0, self.kept_channels(), 1.0)
        return torch.where(self.open, 1.0, mask_C + (self.scores - self.scores.detach()))

    def kept_channels(self) -> Tensor:
        """int64 [kept], increasing."""
        return self.scores.detach().topk(self.kept).indices.sort().values


class KeptChannels(nn.Module):
    """The mask of a compact network: the backbone channels that were kept, in the order in which they are packed."""

    channels: Tensor

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.register_buffer("channels", torch.arange(kept))

    def kept_channels(self) -> Tensor:
        """int64 [kept], increasing."""
        return self.channels


@dataclass(frozen=True)
class Channels:
    """A set of channels that some layers write and others read.

    `full` is their number in Dense, `size` the number really computed; `masks` choose among them in
    Sparse-CNN.
    """

    full: int
    size: int
    masks: tuple[ChannelMask | KeptChannels, ...] = ()

    def __add__(self, other: Channels) -> Channels:
        """Both, concatenated."""
        return Channels(self.full + other.full, self.size + other.size, self.masks + other.masks)

    @property
    def masked(self) -> bool:
        """Whether readers have to skip some channels."""
        return any(isinstance(mask, ChannelMask) for mask in self.masks)

    def mask(self) -> Tensor:
        """1 for the kept channels, 0 for the others, [size]. Only masked channels have it."""
        return torch.cat([mask() for mask in self.masks])

    def kept_channels(self) -> Tensor:
        """Positions of the kept channels among all `size`, int64, increasing."""
        if not self.masked:
            device = self.masks[0].kept_channels().device if self.masks else None
            return torch.arange(self.size, device=device)
        offset, positions = 0, []
        for mask in self.masks:
            positions.append(mask.kept_channels() + offset)
            offset += mask.scores.numel()  # type: ignore[operator]
        return torch.cat(positions)
