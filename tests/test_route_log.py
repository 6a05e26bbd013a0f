"""The route log in Python: reading returns the written rows, and the statistics equal those of NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from advmoe import rust_router
from advmoe.errors import ConfigError, DataError
from advmoe.evaluation.dissection import dissection
from advmoe.routing_log import Dissection, PathwayChannels, RouteLog


def windows(num_experts: int, width: int, size: int) -> list[list[int]]:
    starts = [round(e * width / num_experts) for e in range(num_experts)]
    return [[(start + slot) % width for slot in range(size)] for start in starts]


def random_log(n: int, num_experts: list[int], seed: int = 0) -> RouteLog:
    generator = np.random.default_rng(seed)
    experts = np.stack([generator.integers(0, N, n) for N in num_experts], axis=1)
    log = RouteLog(num_experts)
    log.append(
        "clean", np.arange(n), experts, labels=generator.integers(0, 4, n), predictions=generator.integers(0, 4, n)
    )
    moved = np.where(generator.random(experts.shape) < 0.2, 0, experts)
    log.append("pgd", np.arange(n)[::-1].copy(), moved[::-1], predictions=generator.integers(0, 4, n))
    return log


def test_rows_come_back_by_sample_with_the_newest_winning() -> None:
    log = RouteLog([2, 3])
    log.append("clean", torch.tensor([4, 1]), torch.tensor([[0, 2], [1, 1]]), labels=torch.tensor([7, 8]))
    log.append(("clean", 0), [4], [[1, 0]], labels=[7], predictions=[3])
    rows = log.routes("clean")
    assert rows.indices.tolist() == [1, 4]
    assert rows.experts_IL.tolist() == [[1, 1], [1, 0]]
    assert rows.labels.tolist() == [8, 7]
    assert rows.predictions.tolist() == [-1, 3]
    assert log.conditions == (("clean", 0),)
    assert log.num_experts == (2, 3)


def test_ranks_merge_to_the_log_of_one_process_whatever_their_order(tmp_path: Path) -> None:
    whole = random_log(20, [2, 3])
    clean = whole.routes("clean")
    parts = []
    for rank in range(2):
        part = RouteLog([2, 3])
        mine = slice(rank, None, 2)
        part.append("clean", clean.indices[mine], clean.experts_IL[mine], labels=clean.labels[mine])
        parts.append(part)
    for order in ([0, 1], [1, 0], [1, 0, 1]):
        merged = RouteLog([2, 3])
        for rank in order:
            merged.merge(parts[rank])
        merged.save(tmp_path / f"{order}.npz")
    first, *others = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert all(other == first for other in others)
    with pytest.raises(ConfigError, match=r"experts per MoE layer, got \[2\]"):
        whole.merge(RouteLog([2]))


def test_a_saved_log_is_read_by_this_module_and_by_numpy(tmp_path: Path) -> None:
    log = random_log(30, [2, 3])
    path = tmp_path / "routes.npz"
    log.save(path)
    again = RouteLog.load(path)
    assert again.conditions == log.conditions
    for condition in ("clean", "pgd"):
        ours, theirs = log.routes(condition), again.routes(condition)
        for column in ("indices", "experts_IL", "labels", "predictions"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["condition_names"].tolist() == ["clean", "pgd"]
        attacked = arrays["condition"] == 1
        np.testing.assert_array_equal(arrays["expert"][attacked], log.routes("pgd").experts_IL)
        np.testing.assert_array_equal(arrays["index"][attacked], np.arange(30))
        columns = dict(arrays)
    np.savez(tmp_path / "theirs.npz", **columns)
    assert RouteLog.load(tmp_path / "theirs.npz").conditions == log.conditions


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", bytes(1000)])
def test_a_file_that_is_no_route_log_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routes.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"routes.npz is not a route log or is damaged: [^\n]+$"):
        RouteLog.load(path)


def test_an_unwritable_place_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot write"):
        RouteLog([2]).save(tmp_path / "missing" / "routes.npz")
    assert list(tmp_path.iterdir()) == []


def test_load_and_entropy_by_layer_and_class() -> None:
    log = RouteLog([2, 4])
    # Class 0: experts 0 and 1 once each in layer 0 (1 bit), always 3 in layer 1 (0 bits). Class 1:
    # nobody.
    log.append("clean", [0, 1], [[0, 3], [1, 3]], labels=[0, 0])
    load = log.expert_load("clean", num_classes=2)
    assert load.counts_LKN.tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 2], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(load.entropy, [[1.0, 0.0], [0.0, 0.0]])
    assert log.expert_load("clean").counts_LKN.tolist() == [[[1, 1, 0, 0]], [[0, 0, 0, 2]]]


def test_unique_pathways_are_those_of_numpy() -> None:
    log = random_log(200, [2, 3, 2])
    pathways, counts = log.unique_pathways("clean")
    expected, expected_counts = np.unique(log.routes("clean").experts_IL, axis=0, return_counts=True)
    order = np.argsort(-expected_counts, kind="stable")
    np.testing.assert_array_equal(pathways, expected[order])
    np.testing.assert_array_equal(counts, expected_counts[order])


def test_a_comparison_dissects_adversarial_examples() -> None:
    log = random_log(100, [2, 3, 2])
    clean, attacked = log.routes("clean"), log.routes("pgd")
    change = log.compare("clean", "pgd")
    assert change is not None
    moved = clean.experts_IL != attacked.experts_IL
    survives, right = ~moved.any(axis=1), attacked.predictions == clean.labels
    assert change.dissection == Dissection(
        survived_right=int((survives & right).sum()),
        fooled_right=int((~survives & right).sum()),
        survived_wrong=int((survives & ~right).sum()),
        fooled_wrong=int((~survives & ~right).sum()),
    )
    assert change.dissection.router_robustness == change.survival == survives.mean()
    assert change.dissection.robust_accuracy == right.mean()
    np.testing.assert_array_equal(change.changed_by_layer, moved.mean(axis=0))
    np.testing.assert_array_equal(change.by_num_changed, np.bincount(moved.sum(axis=1), minlength=4))


def test_routing_of_two_epochs_is_compared_without_predictions() -> None:
    log = RouteLog([2])
    log.append(("train", 1), [0, 1, 2], [[0], [0], [1]])
    log.append(("train", 2), [1, 2, 3], [[0], [0], [1]])
    change = log.compare(("train", 1), ("train", 2))
    assert change is not None
    assert (change.num_samples, change.survival) == (2, 0.5)
    assert change.dissection is None


def test_conditions_without_a_common_sample_have_no_comparison() -> None:
    log = RouteLog([2])
    log.append("clean", [0, 2], [[0], [1]], labels=[0, 0], predictions=[0, 0])
    log.append("pgd", [1, 3], [[0], [1]], labels=[0, 0], predictions=[0, 0])
    assert log.compare("clean", "pgd") is None
    assert dissection(log, "pgd") == {}


def test_similarities_are_those_of_written_out_masks() -> None:
    widths, sizes, num_experts = [8, 12, 6], [4, 7, 3], [2, 3, 2]
    layers = [windows(n, w, s) for n, w, s in zip(num_experts, widths, sizes, strict=True)]
    channels = PathwayChannels(layers, widths)
    log = random_log(40, num_experts)
    masks = np.stack([channels.mask(p) for p in log.routes("clean").experts_IL.tolist()])
    attacked = np.stack([channels.mask(p) for p in log.routes("pgd").experts_IL.tolist()])
    sparse = np.random.default_rng(1).random(26) < 0.5

    iou, cosine = log.mask_similarity("clean", channels, sparse)
    np.testing.assert_array_equal(iou, (masks & sparse).sum(1) / (masks | sparse).sum(1))
    np.testing.assert_allclose(cosine, (masks & sparse).sum(1) / np.sqrt(masks.sum(1) * sparse.sum()), rtol=1e-15)

    bytes_of_255 = (255 * sparse.astype(np.uint8)).view(np.bool_)  # true in NumPy
    np.testing.assert_array_equal(log.mask_similarity("clean", channels, bytes_of_255), (iou, cosine))

    indices, own = log.overlap("clean", "pgd", channels)
    assert indices.tolist() == list(range(40))
    np.testing.assert_array_equal(own, (masks & attacked).sum(1) / (masks | attacked).sum(1))

    first, second = np.triu_indices(40, k=1)
    shared = (masks[first] & masks[second]).sum(1)
    pairs = shared / (masks[first] | masks[second]).sum(1)
    diversity = log.diversity("clean", channels, bins=10)
    assert diversity.exact
    assert diversity.num_pairs == 780  # 40 * 39 / 2
    # No IoU of these sets lies on an edge of the bins but 1, so binary rounding of the edges
    # decides nothing.
    np.testing.assert_array_equal(diversity.histogram, np.histogram(pairs, bins=diversity.edges)[0])
    np.testing.assert_allclose(diversity.mean_iou, pairs.mean(), rtol=1e-12)
    np.testing.assert_allclose(diversity.mean_intersection, shared.mean(), rtol=1e-12)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[2]], "expected experts 0 to 1 in MoE layer 0, got 2"),
        ([[256]], "expected expert_index_BL from 0 to 255, got 256 to 256"),
        ([[-1]], "expected expert_index_BL from 0 to 255, got -1 to -1"),
        ([[0, 0]], r"expected 1 x 1 expert indices \(samples x MoE layers\), got 1 x 2"),
        ([0], "expected expert_index_BL as integers with 2 axes, got int64"),
        ([[0.5]], "expected expert_index_BL as integers with 2 axes, got float64"),
    ],
)
def test_routes_no_such_model_can_take_are_refused(experts: list[object], message: str) -> None:
    log = RouteLog([2])
    with pytest.raises(ConfigError, match=message):
        log.append("clean", [0], experts)  # type: ignore[arg-type]
    assert log.conditions == ()


def test_no_rows_are_no_condition() -> None:
    log = RouteLog([2])
    log.append("clean", np.empty(0, int), np.empty((0, 1), int))
    assert log.conditions == ()


def test_counts_that_do_not_fit_in_memory_are_refused() -> None:
    # 2^16 x 2^20 x 256 counts of 8 bytes are 2^47 bytes: all addresses that a process has.
    log = RouteLog([256] * 2**16)
    log.append("clean", [0], np.zeros((1, 2**16), int), labels=[0])
    with pytest.raises(ConfigError, match=r"expected counts that fit in memory, .*; use fewer classes$"):
        log.expert_load("clean", num_classes=2**20)


@pytest.mark.parametrize("experts", [np.eye(4, 2, dtype=int).T, np.eye(4, 2, dtype=int).reshape(8, 1)])
def test_a_table_with_the_right_number_of_entries_needs_the_right_shape(experts: np.ndarray) -> None:
    log = RouteLog([2, 2])
    rows, columns = experts.shape
    with pytest.raises(ConfigError, match=f"expected 4 x 2 expert indices .*, got {rows} x {columns}"):
        log.append("clean", np.arange(4), experts)
    assert log.conditions == ()


def test_compiled_code_refuses_tables_in_fortran_order() -> None:
    experts, minus = np.asfortranarray(np.eye(4, 2, dtype=np.uint8)), np.full(4, -1, np.int32)
    with pytest.raises(ConfigError, match="expected C-contiguous arrays"):
        rust_router.RouteLog([2, 2]).append(("clean", 0), np.arange(4), experts, minus, minus)
    with pytest.raises(ConfigError, match="expected C-contiguous arrays"):
        rust_router.Channels([np.asfortranarray(np.ones((2, 3), bool))])


def test_a_sample_of_no_pairs_is_refused() -> None:
    channels = PathwayChannels([[[0], [1]]], [2])
    log = RouteLog([2])
    log.append("clean", [0, 1], [[0], [1]])
    with pytest.raises(ConfigError, match="expected at least 1 sampled pair, got 0"):
        log._log.diversity(("clean", 0), channels._compiled, num_bins=2, max_exact=0, sampled=0, seed=0)


def test_a_condition_nobody_logged_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r'has no "apgd" of epoch 0; it has clean \(epoch 0\), pgd \(epoch 0\)'):
        random_log(2, [2]).routes("apgd")


@pytest.mark.parametrize("num_experts", [[0], [257], [2, -1]])
def test_a_log_needs_one_to_256_experts_per_layer(num_experts: list[int]) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 256 experts in every MoE layer"):
        RouteLog(num_experts)


def test_channels_a_layer_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected channels 0 to 3 in MoE layer 0, got 2 to 4 for expert 1"):
        PathwayChannels([[[0, 1], [2, 4]]], [4])
    with pytest.raises(ConfigError, match="expert 1 of MoE layer 0 has no channels"):
        PathwayChannels([[[0, 1], []]], [4])
