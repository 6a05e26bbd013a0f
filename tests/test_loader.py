"""The Rust loader: equality with a definition in NumPy, interrupts, forks and memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from advmoe import rust_router
from advmoe.data.loader import Batch, BatchLoader, CropFlip, default_threads
from advmoe.data.sets import EncodedSet
from advmoe.errors import ConfigError
from advmoe.training.streams import on_device

SEED, STREAM = 7, 3


@dataclass(frozen=True)
class Images:
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def some_images(n: int = 23, height: int = 5, width: int = 6) -> Images:
    generator = np.random.Generator(np.random.Philox(0))
    images = generator.integers(1, 256, (n, height, width, 3), dtype=np.uint8)
    return Images(images, generator.integers(0, 10, n, dtype=np.int64))


def words(purpose: int, epoch: int, index: int, count: int) -> list[int]:
    philox = np.random.Philox(key=[SEED, STREAM], counter=[0, index, epoch, purpose])
    return [int(w) for w in philox.random_raw(count)]


def oracle_order(epoch: int, n: int) -> NDArray[np.int64]:
    return np.argsort(np.array(words(0, epoch, 0, n), dtype=np.uint64), kind="stable")


def oracle_image(image_HWC: NDArray[np.uint8], epoch: int, index: int, padding: int) -> NDArray[np.uint8]:
    """Pad, crop at Philox words 0 and 1 of purpose 1 scaled to 0..2p, mirror on the top bit of purpose 2."""
    height, width, _ = image_HWC.shape
    top, left = (word * (2 * padding + 1) >> 64 for word in words(1, epoch, index, 2))
    padded = np.pad(image_HWC, ((padding, padding), (padding, padding), (0, 0)))
    crop = padded[top : top + height, left : left + width]
    return crop[:, ::-1] if words(2, epoch, index, 1)[0] >> 63 else crop


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(batch[:3] for batch in batches), strict=True)))


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True))


def augmented(images: Images, **options: object) -> BatchLoader:
    defaults: dict[str, object] = {"batch_size": 4, "shuffle": True, "augment": CropFlip(padding=2)}
    return BatchLoader(images, seed=SEED, stream=STREAM, **{**defaults, **options})  # type: ignore[arg-type]


def test_an_epoch_is_what_numpy_makes_of_the_same_random_words() -> None:
    source = some_images()
    got = joined(list(augmented(source).epoch(5)))
    order = oracle_order(5, 23)
    expected = np.stack([oracle_image(source.images[i], 5, int(i), 2) for i in order]).transpose(0, 3, 1, 2)
    assert got.indices.tolist() == order.tolist()
    assert got.labels.tolist() == source.labels[order].tolist()
    assert got.images.dtype == torch.float32
    torch.testing.assert_close(got.images, torch.from_numpy(expected.astype(np.float32) / 255), rtol=0, atol=0)


def test_without_shuffle_and_augmentation_images_come_as_they_are() -> None:
    source = some_images()
    rows = np.array([5, 2, 2, 20])
    got = joined(list(BatchLoader(source, indices=rows, batch_size=3, dtype=torch.uint8).epoch(0)))
    assert got.images.numpy().tobytes() == source.images[rows].transpose(0, 3, 1, 2).tobytes()
    assert got.indices.tolist() == rows.tolist()


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_threads_and_prefetching_change_no_byte(num_threads: int, prefetch: int) -> None:
    source = some_images()
    expected = joined(list(augmented(source, num_threads=1, prefetch=0).epoch(1)))
    got = joined(list(augmented(source, num_threads=num_threads, prefetch=prefetch).epoch(1)))
    assert same(got, expected)


@pytest.mark.parametrize(
    ("set_by", "expected"),
    [
        ({}, (6, 2)),
        ({"LOCAL_WORLD_SIZE": "2"}, (3, 2)),  # processes of one machine share its six processors
        ({"LOCAL_WORLD_SIZE": "8"}, (1, 1)),
        ({"LOCAL_WORLD_SIZE": "2", "RAYON_NUM_THREADS": "5"}, (5, 5)),
    ],
)
def test_encoded_images_are_decoded_on_the_processors_of_this_process(
    monkeypatch: pytest.MonkeyPatch, set_by: dict[str, str], expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by.items():
        monkeypatch.setenv(name, value)
    none = np.zeros(0, np.int64)
    encoded = EncodedSet(files=(), file_index=none, offsets=none, lengths=none, labels=none, class_names=())
    assert (default_threads(encoded), default_threads(some_images())) == expected
    for wrong in ("many", "0", "1025"):
        monkeypatch.setenv("RAYON_NUM_THREADS", wrong)
        with pytest.raises(ConfigError, match=f"expected RAYON_NUM_THREADS from 1 to 1024, got '{wrong}'"):
            default_threads(encoded)


@pytest.mark.parametrize("start", range(7))
def test_an_epoch_resumed_at_any_batch_ends_the_same(start: int) -> None:
    loader = augmented(some_images(), num_threads=1)
    whole = list(loader.epoch(2))
    assert len(whole) == len(loader) == 6  # 23 images in batches of 4
    rest = list(loader.epoch(2, start))
    assert len(rest) == 6 - start
    for got, expected in zip(rest, whole[start:], strict=True):
        assert same(got, expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_see_every_image_once_and_agree_with_one_process(world_size: int, drop_last: bool) -> None:
    source = some_images()
    batch_size = 8 // world_size  # the step of all ranks stays 8 images
    alone = augmented(source, batch_size=8, drop_last=drop_last)
    ranks = [
        augmented(source, batch_size=batch_size, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    expected = list(alone.epoch(3))
    steps = [list(loader.epoch(3)) for loader in ranks]
    assert [len(s) for s in steps] == [len(loader) for loader in ranks]
    for step, whole in enumerate(expected):
        union = joined([batches[step] for batches in steps if step < len(batches)])
        assert same(union, whole)
    # 23 images: two full steps of 8, and one of 7 unless it is dropped.
    assert sum(len(batch.indices) for batches in steps for batch in batches) == (16 if drop_last else 23)


def test_a_last_step_smaller_than_the_world_leaves_a_rank_without_a_batch() -> None:
    lengths = [len(BatchLoader(some_images(5), batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert lengths == [1, 2]  # a step of 4, then 1 image: shares 0..0 and 0..1


def test_streams_are_independent() -> None:
    source = some_images()
    orders = [
        next(BatchLoader(source, batch_size=23, shuffle=True, seed=SEED, stream=s).epoch(0)).indices for s in (0, 1)
    ]
    assert not torch.equal(*orders)
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist()) == list(range(23))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("start", "numbers"), [(0, [0, 3, 6, 9]), (4, [4, 7, 10])])
def test_every_third_batch_is_made_and_no_other(prefetch: int, start: int, numbers: list[int]) -> None:
    loader = augmented(some_images(), batch_size=2, num_threads=2, prefetch=prefetch)  # 23 images: batches 0 to 11
    whole = list(loader.epoch(0))
    made = list(loader.epoch(0, start, every=3))
    assert len(made) == len(numbers)
    for got, number in zip(made, numbers, strict=True):
        assert same(got, whole[number])


def test_channels_last_and_normalized_batches_hold_the_same_images() -> None:
    source = some_images()
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.75, 2.0)
    plain = joined(list(augmented(source).epoch(0))).images
    batch = next(augmented(source, batch_size=23, mean=mean, std=std, channels_last=True).epoch(0)).images
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)


def test_memory_is_used_again_only_when_nobody_sees_the_batch() -> None:
    loader = BatchLoader(some_images(), batch_size=4, prefetch=0)
    kept = next(loader.epoch(0)).images[0, 0]  # a view keeps all of its batch
    before = kept.clone()
    addresses = [batch.images.data_ptr() for epoch in range(5) for batch in loader.epoch(epoch)]
    assert torch.equal(kept, before)
    assert kept.data_ptr() not in addresses
    assert len(set(addresses)) <= 2  # the batch in use and the one being made


def test_an_abandoned_epoch_leaves_no_thread_behind() -> None:
    import threading

    others = set(threading.enumerate())

    def ours() -> set[threading.Thread]:
        return {t for t in set(threading.enumerate()) - others if t.name.startswith("batches-ahead")}

    loader = augmented(some_images(), prefetch=3)
    epoch = loader.epoch(0)
    next(epoch)
    assert ours(), "an epoch has a thread, as long as it is not abandoned"
    del epoch
    for _ in range(20):
        next(loader.epoch(0))
    deadline = time.monotonic() + 60
    while ours():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _send_rest(batches: object, pipe: object) -> None:
    pipe.send([b.indices.tolist() for b in batches])  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("every", [1, 3])
def test_a_forked_child_goes_on_with_threads_of_its_own(every: int) -> None:
    loader = augmented(some_images(), batch_size=2, num_threads=2)
    expected = [b.indices.tolist() for b in loader.epoch(0)][::every]
    batches = loader.epoch(0, every=every)
    next(batches)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_send_rest, args=(batches, theirs))
    child.start()
    assert ours.poll(20), "the child hangs"
    assert ours.recv() == expected[1:]
    child.join(20)
    assert child.exitcode == 0
    assert [b.indices.tolist() for b in batches] == expected[1:]


# A batch of this program would take minutes. It runs one child for each way of loading, which is
# interrupted.
SLOW = """
    import os, signal, sys, threading, time, numpy as np
    from types import SimpleNamespace
    from advmoe.data.loader import BatchLoader
    from advmoe.data.transforms import RandomResizedCrop

    # Whoever starts a program in the background may have it ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def while_waiting(loader):
        try:
            next(loader.epoch(0))
        except KeyboardInterrupt:
            os._exit(3)
        os._exit(4)

    # The loader works ahead, nobody closes its iteration, and the program ends as Python ends its threads.
    def while_at_work(loader):
        batches = loader.epoch(0)
        threading.Thread(target=next, args=(batches,), daemon=True).start()
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            sys.exit(3)

    source = SimpleNamespace(images=np.zeros((1, 1000, 1000, 3), np.uint8), labels=np.zeros(1, np.int64))
    crop, rows = RandomResizedCrop(size=8, scale=(1.0, 1.0)), np.zeros(500_000, np.int64)
    for use, prefetch, num_threads in (
        (while_waiting, 0, 1),
        (while_waiting, 0, 2),
        (while_waiting, 2, 7),
        (while_at_work, 2, 2),
    ):
        child = os.fork()
        if not child:
            options = dict(prefetch=prefetch, num_threads=num_threads)
            use(BatchLoader(source, indices=rows, batch_size=250_000, augment=crop, **options))
        time.sleep(0.2)
        os.kill(child, signal.SIGINT)
        print(use.__name__, prefetch, num_threads, flush=True)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    print("all ended")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_interrupt_ends_a_slow_batch_at_once() -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SLOW)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert out.endswith("all ended\n"), out + errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_lie_in_page_locked_memory() -> None:
    source = some_images()
    plain = joined(list(augmented(source, pin_memory=False).epoch(1)))
    batches = list(augmented(source).epoch(1))
    assert all(batch.images.is_pinned() for batch in batches)
    assert same(joined(batches), plain)
    on_device = [batch.images.to("cuda", non_blocking=True) for batch in augmented(source).epoch(1)]
    assert torch.equal(torch.cat(on_device).cpu(), plain.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "expected batch_size >= 1, got 0"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "expected a rank from 0 to 1, got 2"),
        ({"batch_size": 1, "indices": np.array([23])}, "expected indices from 0 to 22, got 23 to 23"),
        ({"batch_size": 1, "indices": np.array([0.5])}, "expected indices as a list of row numbers, got float64"),
        ({"batch_size": 1, "seed": -1}, "expected seed and stream from 0"),
        ({"batch_size": 1, "dtype": torch.float64}, "expected dtype torch.float32 or torch.uint8"),
        ({"batch_size": 1, "std": (0.0, 1.0, 1.0)}, "3 positive standard deviations"),
        ({"batch_size": 1, "num_threads": 0}, "expected num_threads from 1 to 1024, got 0"),
        ({"batch_size": 1, "num_threads": 10**6}, "expected num_threads from 1 to 1024, got 1000000"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchLoader(some_images(), **options)  # type: ignore[arg-type]


def test_images_of_another_form_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected C-contiguous uint8 images"):
        BatchLoader(Images(np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, np.int64)), batch_size=1)
    with pytest.raises(ConfigError, match="a label for each of 2 images, got 1 labels"):
        BatchLoader(Images(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(1, np.int64)), batch_size=1)


def filler(**options: object) -> rust_router.BatchFiller:
    defaults: dict[str, object] = {
        "seed": 0,
        "stream": 0,
        "transform": rust_router.Transform.as_they_are(),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "channels_last": False,
        "num_threads": 1,
        "skip_bad": False,
    }
    return rust_router.BatchFiller(**{**defaults, **options})  # type: ignore[arg-type]


def test_compiled_code_starts_no_million_threads() -> None:
    for num_threads in (0, 10**6):
        with pytest.raises(ConfigError, match=f"expected 1 to 1024 loader threads, got {num_threads}"):
            filler(num_threads=num_threads)


def test_an_order_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"expected a number of images whose order fits in memory, got {2**62}"):
        rust_router.epoch_order(0, 0, 0, 2**62)


@pytest.mark.parametrize(
    ("channels_last", "shape", "expected"),
    [
        (False, (3, 1, 5, 6), r"expected a batch \[1, 3, H, W\] to fill, got \[3, 1, 5, 6\]"),
        (False, (1, 1, 15, 6), r"got \[1, 1, 15, 6\]"),
        (True, (1, 5, 9, 2), r"expected a batch \[1, H, W, 3\] to fill, got \[1, 5, 9, 2\]"),
    ],
)
def test_a_batch_to_fill_has_the_right_axes(channels_last: bool, shape: tuple[int, ...], expected: str) -> None:
    images = some_images(1).images
    with pytest.raises(ConfigError, match=expected):
        filler(channels_last=channels_last).fill(
            images, np.zeros(1, np.int64), 0, np.zeros(shape, np.uint8), rust_router.Stop()
        )


def test_compiled_code_refuses_images_in_fortran_order() -> None:
    images, out = some_images(2).images, np.zeros((2, 3, 5, 6), np.uint8)
    for source, target in ((np.asfortranarray(images), out), (images, np.asfortranarray(out))):
        with pytest.raises(ConfigError, match="expected C-contiguous arrays"):
            filler().fill(source, np.arange(2), 0, target, rust_router.Stop())


def test_an_epoch_or_batch_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="a batch from 0 to 6, got 0 and 7"):
        augmented(some_images()).epoch(0, 7)


def test_bytes_that_become_floats_on_the_device_are_the_floats_of_the_loader() -> None:
    all_levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    images = Images(np.concatenate([all_levels, all_levels]), np.arange(8))
    of_floats, of_bytes = (
        joined(list(BatchLoader(images, batch_size=3, shuffle=True, augment=CropFlip(padding=2), dtype=dtype).epoch(1)))
        for dtype in (torch.float32, torch.uint8)
    )
    assert of_bytes.images.dtype == torch.uint8
    arrived = on_device(of_bytes, torch.device("cpu"))
    assert arrived.images.dtype == torch.float32
    assert same(arrived, of_floats)
    assert same(on_device(of_floats, torch.device("cpu")), of_floats)
