"""Measure the image loader, and compare it with Pillow, torchvision's DataLoader and a training step.

    python benchmarks/loader.py --json

All measurements alternate in one process. A throughput in wall time is that of the best round,
because other work on the machine can only slow a round down. The median is reported too. A ratio is
the median over rounds of the ratio of CPU times on one thread within a round.

- `crop_flip_f32_1t`, `crop_flip_f32_2t`: 32 x 32 images, crop + flip + float32 normalized, images/s
  on one thread, and on two that fill batches of their own, as a loader's threads do;
  `crop_flip_2t_vs_1t`: median over rounds of their ratio; `crop_flip_f32_cpu`: the same per second
  of CPU time, on one thread
- `loader_f32_1t`, `loader_f32_2t`: the same out of a BatchLoader of batches of 128, with none and
  with four made ahead; with two threads, handing 200 us of work from thread to thread in Python is
  what costs
- `vs_dataloader`: the same batches against torchvision's transforms in a DataLoader
- `rrc_images_per_cpu_s`: JPEG of 500 x 375, RandomResizedCrop(224) + flip + float32 normalized, per
  second of CPU; `rrc_vs_pil`, `rrc_vs_torchvision`: that against Pillow, and against torchvision's
  decoder and transforms on tensors
- `share_of_train_step`: a batch of 128 against one plain forward, backward and SGD step of a VGG-16
  S-Dense of an eighth of the width, which is cheaper than any step this project trains with

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

import advmoe
from advmoe import rust_router
from advmoe.data.loader import BatchLoader, CropFlip
from advmoe.data.sets import EncodedSet
from advmoe.data.transforms import RandomResizedCrop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128


@dataclass(frozen=True)
class Images:
    images: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """The usual CIFAR data set: an array, shown as Pillow images to torchvision's transforms."""

    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images.images[row])), int(self.images.labels[row])


def cifar_like(n: int) -> Images:
    generator = np.random.default_rng(0)
    return Images(generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.zeros(n, dtype=np.int64))


def photos(folder: Path, copies: int) -> list[bytes]:
    """Two photographs at ImageNet's usual size and quality."""
    contents = []
    for number, photo in enumerate(load_sample_images().images):
        path = folder / f"{number}.jpg"
        Image.fromarray(photo).resize((500, 375), Image.Resampling.LANCZOS).save(path, "JPEG", quality=95)
        contents.append(path.read_bytes())
    return contents * copies


def encoded_set(folder: Path, copies: int) -> EncodedSet:
    files = tuple(str(path) for path in sorted(folder.iterdir()))
    n = len(files) * copies
    nothing = np.zeros(n, dtype=np.int64)
    return EncodedSet(
        files=files,
        file_index=np.arange(n) % len(files),
        offsets=nothing,
        lengths=nothing,
        labels=nothing,
        class_names=("photo",),
    )


def wall(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fill_batches(source: Images) -> Callable[[], None]:
    """Fill one buffer with all batches of a shuffled epoch, on the calling thread."""
    filler = rust_router.BatchFiller(
        seed=0,
        stream=0,
        transform=rust_router.Transform.crop_flip(4, True),
        mean=MEAN,
        std=STD,
        channels_last=False,
        num_threads=1,
        skip_bad=False,
    )
    order = rust_router.epoch_order(0, 0, 0, len(source.labels))
    out, stop = np.empty((BATCH, 3, 32, 32), dtype=np.float32), rust_router.Stop()

    def work() -> None:
        for batch in range(len(order) // BATCH):
            filler.fill(source.images, order[batch * BATCH : (batch + 1) * BATCH], 0, out, stop)

    return work


def on_each_thread(works: list[Callable[[], None]]) -> Callable[[], None]:
    """Run all functions at once, each several times, so that starting the threads takes a negligible time."""

    def several(work: Callable[[], None]) -> None:
        for _ in range(4):
            work()

    def run() -> None:
        threads = [threading.Thread(target=several, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def crop_flip(rounds: int, num_images: int) -> dict[str, float]:
    source = cifar_like(num_images)
    few = cifar_like(num_images // 16)
    fills = [fill_batches(source) for _ in range(2)]
    one, two = on_each_thread(fills[:1]), on_each_thread(fills)
    alone, shared = (
        BatchLoader(
            source,
            batch_size=BATCH,
            shuffle=True,
            augment=CropFlip(),
            mean=MEAN,
            std=STD,
            num_threads=num_threads,
            prefetch=prefetch,
        )
        for num_threads, prefetch in ((1, 0), (2, 4))
    )
    theirs = DataLoader(Pictures(few), batch_size=BATCH, shuffle=True)
    walls: dict[str, list[float]] = {"crop_flip_f32_1t": [], "crop_flip_f32_2t": []}
    walls |= {"loader_f32_1t": [], "loader_f32_2t": []}
    cpus, ratios = [], []
    for work in (one, two, lambda: list(alone.epoch(0)), lambda: list(shared.epoch(0))):
        work()
    for _ in range(rounds):
        walls["crop_flip_f32_1t"].append(wall(one) / 4)
        walls["crop_flip_f32_2t"].append(wall(two) / 8)
        walls["loader_f32_1t"].append(wall(lambda: [None for _ in alone.epoch(0)]))
        walls["loader_f32_2t"].append(wall(lambda: [None for _ in shared.epoch(0)]))
        cpus.append(harness.cpu(fills[0]))
        ours = harness.cpu(lambda: [None for _ in alone.epoch(0)]) / len(source.labels)
        ratios.append(harness.cpu(lambda: [None for _ in theirs]) / len(few.labels) / ours)
    n = len(source.labels)
    figures = {name: n / min(times) for name, times in walls.items()}
    figures |= {f"{name}_median": n / statistics.median(times) for name, times in walls.items()}
    pairs = zip(walls["crop_flip_f32_1t"], walls["crop_flip_f32_2t"], strict=True)
    return {
        **figures,
        "crop_flip_2t_vs_1t": statistics.median(first / second for first, second in pairs),
        "crop_flip_f32_cpu": n / statistics.median(cpus),
        "vs_dataloader": statistics.median(ratios),
    }


def random_resized_crop(rounds: int) -> dict[str, float]:
    mean_CHW, std_CHW = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (MEAN, STD))
    crop = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])
    tensors = v2.Compose([crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def with_pil(content: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
        image = crop(Image.open(io.BytesIO(content)).convert("RGB"))
        levels = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
        return np.ascontiguousarray((levels / 255 - mean_CHW) / std_CHW)

    def with_torchvision(content: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = tensors(decode_jpeg(content, mode=ImageReadMode.RGB))
        return image

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        contents = photos(Path(folder), 16)
        encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        loader = BatchLoader(
            encoded_set(Path(folder), 16),
            batch_size=16,
            augment=RandomResizedCrop(size=224),
            mean=MEAN,
            std=STD,
            num_threads=1,
            prefetch=0,
        )
        times = [
            (
                harness.cpu(lambda: [None for _ in loader.epoch(0)]),
                harness.cpu(lambda: [None for content in contents if with_pil(content) is None]),
                harness.cpu(lambda: [None for content in encoded if with_torchvision(content) is None]),
            )
            for _ in range(rounds + 1)
        ][1:]
    return {
        "rrc_images_per_cpu_s": len(contents) / statistics.median(ours for ours, _, _ in times),
        "rrc_vs_pil": statistics.median(pil / ours for ours, pil, _ in times),
        "rrc_vs_torchvision": statistics.median(tensor / ours for ours, _, tensor in times),
    }


def share_of_train_step(rounds: int) -> float:
    model = advmoe.create_model("vgg16", kind="s_dense", num_classes=10, model_scale=0.5, width=0.125)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = BatchLoader(
        cifar_like(128 * 20), batch_size=128, shuffle=True, augment=CropFlip(), prefetch=0, num_threads=1
    )
    batch = next(loader.epoch(0))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()

    step()
    batches = len(loader)
    return statistics.median(
        harness.cpu(lambda: list(loader.epoch(0))) / batches / harness.cpu(step) for _ in range(rounds)
    )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        options.rounds = 1
    results: dict[str, Any] = {
        **crop_flip(options.rounds, 1024 if options.smoke else 16_384),
        **random_resized_crop(options.rounds),
        "share_of_train_step": share_of_train_step(options.rounds),
        **harness.machine(),
    }
    harness.emit(results, as_json=options.json)


if __name__ == "__main__":
    main()
