"""Measure the comparison of pathways and their statistics.

    python benchmarks/pathways.py --json

All figures are CPU times on one thread, medians over alternating rounds.

- `one_vs_10k_ms`: IoU and cosine of one mask with 10,000 pathways of 20 layers and 4,800 channels,
  milliseconds
- `all_pairs_10k_s`: histogram of the IoU of all 49,995,000 pairs of 10,000 distinct pathways,
  seconds
- `all_pairs_vs_torch`: time of torch divided by `all_pairs_10k_s`. torch computes a float32 matmul
  of the masks with themselves and a histogram of the IoU. Its time is measured on 500 of the 10,000
  rows, and multiplied by 20
- `summary_1m3_s`: 1.3 million samples x 20 layers, clean and attacked: load and entropy by class,
  distinct pathways, changes of routing, own overlap, mask similarity and diversity, seconds

Shape suffixes: I images of a set, L MoE layers.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import numpy as np
import torch

from advmoe.routing_log import PathwayChannels, RouteLog

LAYERS, WIDTH, CLASSES = 20, 240, 1000
NUM_EXPERTS = [2] * LAYERS


def halves() -> PathwayChannels:
    """Two experts of half the channels in each layer."""
    experts = [range(WIDTH // 2), range(WIDTH // 2, WIDTH)]
    return PathwayChannels([experts] * LAYERS, [WIDTH] * LAYERS)


def log_of(experts_IL: np.ndarray[Any, np.dtype[np.uint8]], changed: float) -> RouteLog:
    """A log with the given choices as condition "clean", and with a share of them changed as "pgd"."""
    generator = np.random.default_rng(1)
    n = len(experts_IL)
    labels = generator.integers(0, CLASSES, n)
    log = RouteLog(NUM_EXPERTS)
    log.append("clean", np.arange(n), experts_IL, labels=labels, predictions=labels)
    moved = experts_IL ^ (generator.random(experts_IL.shape, dtype=np.float32) < changed)
    log.append("pgd", np.arange(n), moved, labels=labels, predictions=generator.integers(0, CLASSES, n))
    return log


def distinct_pathways(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    codes = np.random.default_rng(0).permutation(2**LAYERS)[:n]
    return ((codes[:, None] >> np.arange(LAYERS)) & 1).astype(np.uint8)


def many_samples(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Samples that take the pathway of their class with some noise: tens of thousands of distinct pathways."""
    generator = np.random.default_rng(2)
    prototypes = generator.integers(0, 2, (CLASSES, LAYERS), dtype=np.uint8)
    experts = prototypes[generator.integers(0, CLASSES, n)]
    return experts ^ (generator.random(experts.shape, dtype=np.float32) < 0.05)


def torch_pairs(masks: torch.Tensor, rows: int) -> Callable[[], None]:
    sizes = masks.sum(1)

    def work() -> None:
        shared = masks[:rows] @ masks.T
        iou = shared / (sizes[:rows, None] + sizes - shared)
        torch.histc(iou, bins=50, min=0.0, max=1.0)

    return work


def summary(log: RouteLog, channels: PathwayChannels, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    for condition in ("clean", "pgd"):
        log.expert_load(condition, num_classes=CLASSES).entropy.mean()
        log.unique_pathways(condition)
        log.mask_similarity(condition, channels, mask)
        log.diversity(condition, channels)
    log.compare("clean", "pgd")
    log.overlap("clean", "pgd", channels)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    channels = halves()
    mask = np.random.default_rng(3).random(channels.num_channels) < 0.5
    if options.smoke:
        options.rounds = 1
    pathways = distinct_pathways(600 if options.smoke else 10_000)
    log = log_of(pathways, 0.1)
    masks = torch.from_numpy(np.concatenate([table[pathways[:, i]] for i, table in enumerate(channels.tables)], axis=1))
    rows = 500
    theirs = torch_pairs(masks.float(), rows)
    times: list[tuple[float, float, float]] = []
    for _ in range(options.rounds):
        one = harness.cpu(lambda: [log.mask_similarity("clean", channels, mask) for _ in range(20)]) / 20
        pairs = harness.cpu(lambda: log.diversity("clean", channels))
        times.append((one, pairs, harness.cpu(theirs) * len(pathways) / rows))
    del masks, theirs

    many = log_of(many_samples(1_300 if options.smoke else 1_300_000), 0.05)
    results: dict[str, Any] = {
        "one_vs_10k_ms": 1e3 * statistics.median(one for one, _, _ in times),
        "all_pairs_10k_s": statistics.median(pairs for _, pairs, _ in times),
        "all_pairs_vs_torch": statistics.median(theirs / pairs for _, pairs, theirs in times),
        "summary_1m3_s": statistics.median(harness.cpu(lambda: summary(many, channels, mask)) for _ in range(3)),
        "summary_1m3_distinct": len(many.unique_pathways("clean")[1]),
        **harness.machine(),
    }
    harness.emit(results, as_json=options.json)


if __name__ == "__main__":
    main()
