"""A step of several ranks as one step on the union of their batches.

A rank's loss is the part of its images in the mean loss over the union. The sum of all ranks'
losses is therefore the loss of one process with all images, and the sum of their gradients is its
gradient. Ranks may have different numbers of images, because a batch does not divide evenly or an
image cannot be decoded.

Shape suffixes: G ranks, J streams of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from advmoe.data.loader import Batch
from advmoe.distributed import Place, agree, sum_up, total, world


def placed(batches: Sequence[Batch], union_size: int, *, counted: bool) -> list[Batch]:
    """The batches of one step, each with its place in the union of all ranks' batches.

    Args:
        batches: One batch of each stream.
        union_size: Images of all ranks in a full step.
        counted: Whether the ranks exchange their numbers of images, because some images may be left
            out.
    """
    if world().size == 1:
        return list(batches)
    if not counted:
        return [batch._replace(place=Place(world().share(union_size).start, union_size)) for batch in batches]
    counts_GJ = agree([len(batch.labels) for batch in batches])
    first_J = counts_GJ[: world().rank].sum(dim=0).tolist()
    total_J = counts_GJ.sum(dim=0).tolist()
    return [
        batch._replace(place=Place(first, number))
        for batch, first, number in zip(batches, first_J, total_J, strict=True)
    ]


def size_of_union(batch: Batch) -> int:
    """Number of images of all ranks' batches of a step."""
    return len(batch.labels) if batch.place is None else batch.place.total


def micro_batches(batch: Batch, number: int) -> list[tuple[Batch, slice]]:
    """The parts of a batch that are computed one after another, and their rows in it.

    They take turns with the positions in the union of all ranks' batches. So each rank has its
    share of each part, and the parts are the same images in every world.
    """
    if number == 1:
        return [(batch, slice(None))]
    own = batch.place or Place(0, len(batch.labels))
    parts = []
    for part in range(number):
        first = (part - own.first) % number
        rows = slice(first, None, number)
        place = Place(own.first + first, own.total, number)
        parts.append((Batch(batch.images[rows], batch.labels[rows], batch.indices[rows], place), rows))
    return parts


def part_of_union(loss: Tensor, batch: Batch) -> Tensor:
    """This rank's part of the mean loss over the union, computed from the mean loss of its batch."""
    if batch.place is None:
        return loss
    if not len(batch.labels):  # the mean over no image is NaN, and no image gets a gradient
        return torch.nan_to_num(loss * 0.0)
    return loss * (len(batch.labels) / batch.place.total)


def mean_over_union(values: Tensor, place: Place | None) -> Tensor:
    """Mean over the first axis, which counts images, of all ranks together."""
    return values.mean(dim=0) if place is None else total(values.sum(dim=0)) / place.total


@torch.no_grad()
def sum_gradients(gradients: Iterable[Tensor | None], loss: Tensor) -> Tensor:
    """Add up gradients over all ranks, in place, in one exchange with the loss.

    Args:
        gradients: Gradients of one level's parameters; None, on all ranks alike, if the loss does
            not depend on one.
        loss: This rank's part of the loss.

    Returns:
        The loss of the union: not finite if the loss of any rank is not.
    """
    loss = loss.detach().clone()
    sum_up([*(gradient for gradient in gradients if gradient is not None), loss])
    return loss
