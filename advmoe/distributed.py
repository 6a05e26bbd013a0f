"""Several processes that act as one: the ranks that `torchrun` starts, and their collectives.

A process without torchrun, or alone under it, is a world of one rank. All functions here then
return their argument immediately. A single process thus computes the same bits as without this
module, at no cost.

NCCL exchanges tensors between GPUs, gloo between CPUs. Plain objects and tensors on the CPU always
use gloo, so that the exchange of a flag never waits for a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from advmoe.errors import AdvMoEError, LostRankError
from advmoe.world import GROUP, World, launched, restarts

T = TypeVar("T")

MEETING_SECONDS = 600.0
"""Time limit for all ranks to start."""
COLLECTIVE_SECONDS = 1800.0
"""Time limit of a collective. It is long, because rank 0 may be reading or downloading a data set."""
PATIENT_SECONDS = 7 * 24 * 3600.0
"""Time limit of a collective where ranks have little to exchange, so that one without a batch waits for the others.
The loss of a rank is noticed at once, by its connection."""
ECHO_SECONDS = 1.0
"""Time that a rank without contact waits for another rank to report the reason."""


class Place(NamedTuple):
    """Position of a rank's batch in the union of all ranks' batches of a step."""

    first: int
    """Position of its first image."""
    total: int
    """Images of all ranks."""
    every: int = 1
    """From one of its images to the next: a micro-batch has every k-th."""


class _Placed(NamedTuple):
    """The place of a batch that networks see."""

    place: Place
    images: int
    first: int | Tensor
    """`place.first`. A compiled graph is good for one number only, so where micro-batches differ, it is a tensor."""


_world = World()
_store: Store | None = None
_placed: _Placed | None = None


def world() -> World:
    """The world this process is in; one rank alone outside of `joined`."""
    return _world


@contextmanager
def joined(device: torch.device, *, patience: float = COLLECTIVE_SECONDS) -> Iterator[World]:
    """Connect to the other ranks for the duration of the context.

    Args:
        device: Device of this rank.
        patience: Time limit of a collective in seconds.

    Raises:
        ConfigError: The environment variables of torchrun are incomplete.
        LostRankError: The other ranks did not connect in time.
    """
    global _world, _store
    described = launched()
    if described.size == 1:
        yield described
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        meeting, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS))))
        # A store may outlive several starts, and then holds addresses of processes that have ended.
        start = f"{restarts()}/{described.size}/{os.environ['MASTER_PORT']}"
        _store = PrefixStore(f"advmoe/{os.environ.get(GROUP, '')}/{start}", meeting)
        _await_all(_store, described)
        dist.init_process_group(
            backend,
            store=_store,
            rank=described.rank,
            world_size=described.size,
            timeout=timedelta(seconds=patience),
        )
    except (RuntimeError, ValueError) as error:  # errors of torch's stores and groups
        raise LostRankError(
            f"rank {described.rank} did not meet all {described.size} ranks within {MEETING_SECONDS:g} s at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({_line(error)}); "
            "start torchrun on every node, with an address and a port that all nodes reach"
        ) from error
    _world = described
    failed = True
    try:
        yield described
        failed = False
    finally:
        _world = World()
        if not failed or backend == "gloo":  # NCCL would wait for unfinished work with a lost rank
            dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this rank computes as if there were no others. All ranks must do the same work in it."""
    global _world
    described, _world = _world, World()
    try:
        yield
    finally:
        _world = described


def _await_all(store: Store, described: World) -> None:
    """Wait until every rank is there. Making a group would wait much longer."""
    store.set(f"here/{described.rank}", "")
    everybody = [f"here/{rank}" for rank in range(described.size)]
    store.wait(everybody, timedelta(seconds=MEETING_SECONDS))


def first_to_say(message: str, *, lost: bool = False) -> bool:
    """Whether this rank prints an error, so that an error of several ranks is printed once.

    Args:
        message: Message of the error.
        lost: Whether this error only follows from another rank's error. That rank gets time to
            print its own.
    """
    if _store is None:  # no rank has met the others yet, so all have the same error
        return launched().leads
    try:
        if lost:
            time.sleep(ECHO_SECONDS)
            return int(_store.add("said", 1)) == 1
        _store.add("said", 1)
        return int(_store.add(f"said/{message}", 1)) == 1
    except RuntimeError:  # the rank with the store has ended
        return True


def keep_for_restarts(key: str) -> None:
    """Store a note that this command reads after a restart by torchrun."""
    if isinstance(_store, PrefixStore):
        _lasting(_store).set(f"advmoe/{os.environ.get(GROUP, '')}/{key}", "")


def kept_before_restart(key: str) -> bool:
    """Whether this note was stored before a restart."""
    name = f"advmoe/{os.environ.get(GROUP, '')}/{key}"
    return restarts() > 0 and isinstance(_store, PrefixStore) and _lasting(_store).check([name])


def _lasting(store: Store) -> Store:
    """The store without the prefixes, which differ between starts."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def _answered() -> Iterator[None]:
    """Convert torch's errors about other ranks into errors of this package."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in ("connection", "timed out", "timeout", "aborted")):
            raise
        raise LostRankError(
            f"rank {_world.rank} lost contact with another rank, which failed or was stopped ({_line(error)})"
        ) from error


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    if _world.size == 1:
        return [value]
    values: list[Any] = [None] * _world.size
    with _answered():
        dist.all_gather_object(values, value)
    return values


def collect(value: T) -> list[T]:
    """The values of all ranks, in their order, on rank 0; an empty list on the others."""
    if _world.size == 1:
        return [value]
    values: list[Any] | None = [None] * _world.size if _world.leads else None
    with _answered():
        dist.gather_object(value, values)
    return values or []


def agree(numbers: Sequence[int]) -> Tensor:
    """The whole numbers of every rank, int64 [size, numbers] on the CPU, on every rank."""
    return stack_all(torch.tensor(numbers, dtype=torch.int64))


def any_rank(*conditions: bool) -> list[bool]:
    """For each condition, whether it holds on any rank."""
    return list(conditions) if _world.size == 1 else agree(conditions).any(dim=0).tolist()


def together(action: Callable[[], T]) -> T:
    """Run an action that may fail on some ranks only. If it fails, all ranks raise the error of the first such rank.

    Otherwise the other ranks would wait for the failed one in their next collective.

    Raises:
        AdvMoEError: `action` raised it.
    """
    if _world.size == 1:
        return action()
    error: AdvMoEError | OSError | None = None
    result: Any = None
    try:
        result = action()
    except LostRankError:
        raise
    except (AdvMoEError, OSError) as caught:
        error = caught
    if any_rank(error is not None)[0]:
        raise next(caught for caught in gather(error) if caught is not None)
    return cast(T, result)


def from_leader(action: Callable[[], T]) -> T:
    """Run an action on rank 0; all ranks get its result.

    Raises:
        AdvMoEError: `action` raised it; all ranks raise it.
    """
    result = together(lambda: [action() if _world.leads else None])
    if _world.size > 1:
        with _answered():
            dist.broadcast_object_list(result)
    return cast(T, result[0])


def leader_first(action: Callable[[], T]) -> T:
    """Run an action that is faster after another rank did it, such as reading files that may have to be downloaded.

    Rank 0 runs it first, then the first rank of each other machine, then the other ranks.

    Raises:
        AdvMoEError: `action` raised it.
    """
    mine = 0 if _world.leads else 1 if _world.local_rank == 0 else 2
    done: list[T] = []
    for turn in range(3 if _world.size > 1 else 1):
        together(lambda: done.append(action()) if turn == mine else None)  # noqa: B023
    return done[0]


def own_rows(num_images: int, batch_size: int, first: int = 0) -> NDArray[np.int64]:
    """Rows of an image set that this rank evaluates: every `size`-th batch, where batches begin at row `first`.

    Batches are the same in every world, so the results are equal bit for bit.
    """
    rows = np.arange(first, num_images, dtype=np.int64)
    mine: NDArray[np.int64] = rows[(rows - first) // batch_size % _world.size == _world.rank]
    return mine


@contextmanager
def placing(place: Place | None, images: int) -> Iterator[None]:
    """Inside, networks know where the batch that they see, of so many images, lies in the union."""
    global _placed
    before, _placed = _placed, None
    if place is not None:
        _placed = _Placed(place, images, place.first if place.every == 1 else torch.tensor(place.first))
    try:
        yield
    finally:
        _placed = before


def positions(rows: int, device: torch.device) -> Tensor:
    """Position of each row of the batch in the union batch; of each image's rows, where it has several."""
    if _placed is None:
        return torch.arange(rows, device=device)
    place, images, begin = _placed
    of_image = rows // max(images, 1)
    first = begin + place.every * torch.arange(images, device=device)
    return (of_image * first[:, None] + torch.arange(of_image, device=device)).flatten()


def share_of_union() -> float:
    """Share of the union batch's images that the batch has."""
    if _placed is None:
        return 1.0
    return _placed.images / _placed.place.total


def sum_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one kind by their sums over all ranks, in one exchange."""
    if _world.size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _answered():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def stack_all(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, [size, ...]; no gradient flows through."""
    if _world.size == 1:
        return tensor.detach().unsqueeze(0)
    flat = tensor.detach().reshape(-1)
    everything = flat.new_empty(_world.size * len(flat))
    with _answered():
        dist.all_gather_into_tensor(everything, flat)
    return everything.view(_world.size, *tensor.shape)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        sum_up([total])
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        sum_up([total])
        return total


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks. Its gradient is that of the sum of all ranks' losses, not only of this rank's."""
    return tensor if _world.size == 1 else cast(Tensor, _Sum.apply(tensor))


def equalize(tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's values to all ranks."""
    if _world.size == 1:
        return
    with _answered(), torch.no_grad():
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)
