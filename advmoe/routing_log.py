"""The route log: the expert that every MoE layer chose for every sample under every condition, and statistics of it.

A log holds one byte per layer and sample, keyed by condition ("clean", an attack's name), epoch and
sample index. A row that comes again replaces the old one, so appending a batch twice or merging the
logs of several ranks in any order gives the same log. Files are NumPy's `.npz`, read by
`numpy.load`; `rust_router/src/routes/file.rs` lists its arrays.

Shape suffixes: B batch, C channels, I images of a set, K classes, L MoE layers, M pathways,
N experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from advmoe import rust_router
from advmoe.errors import ConfigError

IntegerT = TypeVar("IntegerT", np.uint8, np.int32, np.int64)

Condition = str | tuple[str, int]
"""A condition's name, or its name and epoch; the epoch of a name alone is 0."""


class PathwayChannels:
    """The channels that each expert of each MoE layer computes. They make pathways comparable as sets of channels.

    Args:
        layers: Channels of each expert of each layer, `layers[layer][expert]`.
        num_channels: Number of channels of each layer.

    Raises:
        ConfigError: A channel that a layer does not have, or an expert without channels.
    """

    def __init__(self, layers: Sequence[Sequence[Sequence[int]]], num_channels: Sequence[int]) -> None:
        tables = []
        for layer, (experts, width) in enumerate(zip(layers, num_channels, strict=True)):
            table = np.zeros((len(experts), width), dtype=np.bool_)
            for expert, channels in enumerate(experts):
                if channels and not 0 <= min(channels) <= max(channels) < width:
                    raise ConfigError(
                        f"expected channels 0 to {width - 1} in MoE layer {layer}, "
                        f"got {min(channels)} to {max(channels)} for expert {expert}"
                    )
                table[expert, list(channels)] = True
            tables.append(table)
        self.tables = tuple(tables)
        """Per layer [N, channels], bool."""
        self._compiled = rust_router.Channels(tables)

    @property
    def num_channels(self) -> int:
        """Channels of all layers together, C."""
        return self._compiled.num_channels

    def mask(self, pathway: Sequence[int]) -> NDArray[np.bool_]:
        """A pathway as a mask: [C], bool, the layers one after another."""
        return np.concatenate([table[expert] for table, expert in zip(self.tables, pathway, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The rows of one condition, by ascending sample index."""

    indices: NDArray[np.int64]
    """[I]"""
    experts_IL: NDArray[np.uint8]
    """[I, L]: the expert each layer chose."""
    labels: NDArray[np.int32]
    """[I], -1 where unknown."""
    predictions: NDArray[np.int32]
    """[I], -1 where unknown."""


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """How samples spread over experts."""

    counts_LKN: NDArray[np.uint64]
    """[L, K, N]: number of samples of a class that took an expert. K is 1 if classes were not requested."""
    num_experts: tuple[int, ...] = ()
    """Experts of each layer, at most N; empty if every layer has N."""

    @property
    def share(self) -> NDArray[np.float64]:
        """[L, K, N]: each expert's share of its class, 0 where there are no samples."""
        totals = self.counts_LKN.sum(axis=2, keepdims=True)
        share_LKN: NDArray[np.float64] = self.counts_LKN / np.maximum(totals, 1)
        return share_LKN

    @property
    def entropy(self) -> NDArray[np.float64]:
        """[L, K]: entropy of the shares in bits, from 0 for a single expert to log2 N for equal shares."""
        share = self.share
        logs = np.log2(share, where=share > 0, out=np.zeros_like(share))
        entropy_LK: NDArray[np.float64] = -(share * logs).sum(axis=2) + 0.0
        return entropy_LK

    @property
    def evenness(self) -> NDArray[np.float64]:
        """[L, K]: entropy relative to that of equal shares: 0 is a collapsed router, 1 is balance."""
        num_experts = self.num_experts or (self.counts_LKN.shape[2],) * len(self.counts_LKN)
        evenness_LK: NDArray[np.float64] = self.entropy / np.log2(np.maximum(num_experts, 2))[:, None]
        return evenness_LK

    def merged(self, num_layers: int) -> ExpertLoad:
        """The load of each MoE layer, if tokens are routed and a layer has one decision for each token."""
        counts_LTKN = self.counts_LKN.reshape(num_layers, -1, *self.counts_LKN.shape[1:])
        return ExpertLoad(
            counts_LKN=counts_LTKN.sum(axis=1), num_experts=self.num_experts[:: max(1, counts_LTKN.shape[1])]
        )


@dataclass(frozen=True, kw_only=True)
class Dissection:
    """Adversarial examples by fate: a router survives if no MoE layer's choice changed (paper, Figs. 4 and 5)."""

    survived_right: int
    """❶ router survives, prediction right."""
    fooled_right: int
    """❷ router fooled, prediction right."""
    survived_wrong: int
    """❸ router survives, prediction wrong."""
    fooled_wrong: int
    """❹ both fooled."""

    @property
    def num_samples(self) -> int:
        """All four together."""
        return self.survived_right + self.fooled_right + self.survived_wrong + self.fooled_wrong

    @property
    def router_robustness(self) -> float:
        """❶ + ❸ as a share."""
        return (self.survived_right + self.survived_wrong) / self.num_samples

    @property
    def robust_accuracy(self) -> float:
        """❶ + ❷ as a share: RA."""
        return (self.survived_right + self.fooled_right) / self.num_samples


@dataclass(frozen=True, kw_only=True)
class RouteChange:
    """Differences in routing between two conditions or epochs, over the samples of both."""

    num_samples: int
    """Samples that both have."""
    changed_by_layer: NDArray[np.float64]
    """[L]: share of samples whose choice changed."""
    by_num_changed: NDArray[np.int64]
    """[L + 1]: samples by their number of changed layers."""
    dissection: Dissection | None
    """The dissection by the second condition's predictions; None if a label or prediction is unknown."""

    @property
    def survival(self) -> float:
        """Share of samples without any change."""
        return float(self.by_num_changed[0]) / self.num_samples


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Similarity of the pathways of different samples."""

    histogram: NDArray[np.uint64]
    """[bins]: pairs of samples by the IoU of their pathways."""
    edges: NDArray[np.float64]
    """[bins + 1], from 0 to 1."""
    num_pairs: int
    """Pairs in the histogram."""
    exact: bool
    """Whether the histogram has all pairs, and not a random sample of them."""
    mean_iou: float
    """Mean over the pairs in the histogram."""
    mean_intersection: float
    """Mean number of shared channels over all pairs; always exact."""


class RouteLog:
    """Routes by condition, epoch and sample; may be appended to from several threads.

    Args:
        num_experts: Experts of each MoE layer, 1 to 256; none for a model without routing.

    Raises:
        ConfigError: A layer has another number of experts.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        if not all(1 <= n <= 256 for n in num_experts):
            raise ConfigError(f"expected 1 to 256 experts in every MoE layer, got {list(num_experts)}")
        self._log = rust_router.RouteLog(list(num_experts))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RouteLog:
        """Reads a saved log.

        Raises:
            DataError: The file is missing, damaged or not a route log.
        """
        log = cls.__new__(cls)
        log._log = rust_router.RouteLog.load(path)
        return log

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the log to an `.npz` file, whole or not at all.

        Raises:
            DataError: The file cannot be written.
        """
        self._log.save(path)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts of each MoE layer."""
        return tuple(self._log.num_experts)

    @property
    def conditions(self) -> tuple[tuple[str, int], ...]:
        """Names and epochs that have rows, in order."""
        return tuple(self._log.keys())

    def append(
        self,
        condition: Condition,
        indices: Tensor | ArrayLike,
        expert_index_BL: Tensor | ArrayLike,
        *,
        labels: Tensor | ArrayLike | None = None,
        predictions: Tensor | ArrayLike | None = None,
    ) -> None:
        """Adds a batch. It replaces rows of samples that the condition already has.

        Args:
            condition: The condition under which the samples were routed.
            indices: [B], the samples' rows in their image set.
            expert_index_BL: [B, L], the expert that each layer chose.
            labels: [B], true classes, if known.
            predictions: [B], predicted classes, if known.

        Raises:
            ConfigError: Columns do not fit together or do not fit the model. Nothing is added.
        """
        rows = _column(indices, np.int64, "indices")
        unknown = np.full(len(rows), -1, dtype=np.int32)
        self._log.append(
            _key(condition),
            rows,
            _column(expert_index_BL, np.uint8, "expert_index_BL", num_axes=2),
            unknown if labels is None else _column(labels, np.int32, "labels"),
            unknown if predictions is None else _column(predictions, np.int32, "predictions"),
        )

    def merge(self, other: RouteLog) -> None:
        """Adds all rows of another log of the same model. They replace existing rows.

        Raises:
            ConfigError: A log of a model with other MoE layers.
        """
        self._log.merge(other._log)

    def forget_before(self, epoch: int) -> None:
        """Drops all rows of earlier epochs, to limit the size of the log in a long training."""
        self._log.forget_before(_key(("", epoch))[1])

    def routes(self, condition: Condition) -> Routes:
        """All rows of a condition.

        Raises:
            ConfigError: A condition without rows, as in all methods below.
        """
        indices, experts, labels, predictions = self._log.rows(_key(condition))
        return Routes(indices=indices, experts_IL=experts, labels=labels, predictions=predictions)

    def expert_load(self, condition: Condition, *, num_classes: int | None = None) -> ExpertLoad:
        """Load of the experts of each layer, over all samples or for each of `num_classes` classes."""
        if num_classes is not None and num_classes < 2:
            raise ConfigError(f"expected num_classes >= 2, got {num_classes}; leave it out for all samples together")
        counts_LKN = self._log.expert_load(_key(condition), num_classes or 1)
        return ExpertLoad(counts_LKN=counts_LKN, num_experts=self.num_experts)

    def unique_pathways(self, condition: Condition) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Distinct pathways [M, L] and how many samples took each [M], the most frequent first."""
        return self._log.unique(_key(condition))

    def compare(self, before: Condition, after: Condition) -> RouteChange | None:
        """Changes from one condition (clean) to another (an attack), or from one epoch to another.

        Returns:
            The changes, or None if the two have no sample in common.
        """
        found = self._log.compare(_key(before), _key(after))
        if found is None:
            return None
        matched, by_layer, by_num, outcomes = found
        known = Dissection(
            survived_right=outcomes[0], fooled_right=outcomes[1], survived_wrong=outcomes[2], fooled_wrong=outcomes[3]
        )
        return RouteChange(
            num_samples=matched,
            changed_by_layer=np.array(by_layer, dtype=np.float64) / matched,
            by_num_changed=np.array(by_num, dtype=np.int64),
            dissection=None if outcomes[4] else known,
        )

    def mask_similarity(
        self, condition: Condition, channels: PathwayChannels, mask: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """IoU and cosine [I] of each sample's pathway with a mask pathway, [C] bool (paper, Fig. 6)."""
        # A view of integers as bool may hold other bytes than 0 and 1, which Rust would count wrongly.
        bits = np.ascontiguousarray(mask, dtype=np.bool_).view(np.uint8) != 0
        return self._log.mask_similarity(_key(condition), channels._compiled, bits)

    def overlap(
        self, before: Condition, after: Condition, channels: PathwayChannels
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Sample indices [I] and the IoU [I] of each sample's pathways under two conditions."""
        return self._log.overlap(_key(before), _key(after), channels._compiled)

    def diversity(
        self,
        condition: Condition,
        channels: PathwayChannels,
        *,
        bins: int = 50,
        max_exact: int = 2**28,
        sampled: int = 2**22,
        seed: int = 0,
    ) -> Diversity:
        """IoU over pairs of samples.

        Equal pathways are merged first. If more than `max_exact` pairs of distinct pathways remain,
        `sampled` random pairs of samples are used. With the default, each bin's share has a
        standard error below 0.03 %.
        """
        if bins < 1 or max_exact < 0 or sampled < 1:
            raise ConfigError(f"expected bins and sampled >= 1, max_exact >= 0, got {bins}, {sampled}, {max_exact}")
        histogram, num_pairs, exact, mean_iou, mean_intersection = self._log.diversity(
            _key(condition), channels._compiled, num_bins=bins, max_exact=max_exact, sampled=sampled, seed=seed
        )
        return Diversity(
            histogram=histogram,
            edges=np.linspace(0.0, 1.0, bins + 1),
            num_pairs=num_pairs,
            exact=exact,
            mean_iou=mean_iou,
            mean_intersection=mean_intersection,
        )


def _key(condition: Condition) -> tuple[str, int]:
    name, epoch = (condition, 0) if isinstance(condition, str) else condition
    if not 0 <= epoch < 2**32:
        raise ConfigError(f"expected an epoch from 0 to {2**32 - 1}, got {epoch}")
    return name, epoch


def _column(values: Tensor | ArrayLike, dtype: type[IntegerT], name: str, num_axes: int = 1) -> NDArray[IntegerT]:
    """Converts integers to another width, and refuses values that do not fit."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != num_axes or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ConfigError(f"expected {name} as integers with {num_axes} axes, got {array.dtype} {list(array.shape)}")
    limits = np.iinfo(dtype)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ConfigError(f"expected {name} from {limits.min} to {limits.max}, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype=dtype)
