"""The best epoch: chance does not select an early epoch, and a clear difference does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import STANDARD, Observer, train

from advmoe.data.sources import Dataset
from advmoe.errors import CheckpointError
from advmoe.training.selection import FEW_IMAGES, Outcome, Selection, clearly_better, standard_error_at_half


def first(count: int, images: int = 100) -> Outcome:
    """The first so many images are correct."""
    return np.arange(images) < count


def best(*epochs: tuple[Outcome, Outcome]) -> int:
    """Number of the epoch chosen from (right, robust)."""
    selection = Selection()
    chosen = 0
    for number, (right, robust) in enumerate(epochs, start=1):
        if selection.better(right, robust):
            chosen = number
        restored = Selection()  # as a checkpoint between any two epochs does
        restored.load_state_dict(selection.state_dict())
        selection = restored
    return chosen


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_clearly_better_is_more_than_the_standard_error_of_the_paired_difference(
    pairs: list[tuple[bool, bool]],
) -> None:
    one, other = (np.array(outcomes) for outcomes in zip(*pairs, strict=True))
    difference = one.astype(float) - other.astype(float)
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    if abs(mean - error) > 1e-9:  # at equality rounding decides there, and nothing is clear here
        assert clearly_better(one, other) == (mean > error)


def test_one_image_of_eighteen_does_not_make_a_first_epoch_the_best() -> None:
    # SA 33.3 and 66.7 of 18 images, as it happened; the difference of 1/18 is its own standard
    # error
    assert best((first(6, 18), first(1, 18)), (first(12, 18), first(0, 18))) == 2


def test_pairing_sees_what_two_separate_shares_would_not() -> None:
    # 50 and 47 of 100: the standard error of either share is 5 points, but 3 images are lost and
    # none is gained
    assert clearly_better(first(50), first(47))
    # 50 and 47 again, now with other images: 50 gained, 47 lost
    assert not clearly_better(first(50), ~first(53))


def test_a_slow_decline_does_not_pull_the_choice_down() -> None:
    # one image fewer in each epoch is never clear, but against the highest epoch it soon is
    assert best(*((first(90), first(50 - epoch)) for epoch in range(20))) == 2


def test_sa_breaks_ties_of_ra() -> None:
    assert best((first(90), first(50)), (first(80), first(50))) == 1
    assert best((first(80), first(50)), (first(90), first(50))) == 2
    assert best((first(90), first(50)), (first(89), first(50))) == 2, "one image of SA is as little a reason"
    assert best((first(90), first(50)), (first(80), first(60))) == 2, "RA comes first"
    # epoch 1 is kept for its SA until epoch 3 has clearly more RA, although not more than the
    # second
    assert best((first(90), first(50)), (first(80), first(51)), (first(80), first(52))) == 3


def test_a_higher_peak_makes_earlier_epochs_ineligible() -> None:
    assert best((first(95), first(40)), (first(90), first(50))) == 2


def test_a_single_epoch_is_the_best_even_without_a_robust_image() -> None:
    assert best((first(10), first(0))) == 1


def test_damaged_outcomes_are_refused() -> None:
    state = {name: torch.ones(4, dtype=torch.bool) for name in ("peak_robust", "best_robust", "best_right")}
    Selection().load_state_dict(state)
    for damage in ({"peak_robust": torch.ones(4)}, {"peak_robust": state["peak_robust"][:3]}, {"other": torch.ones(4)}):
        with pytest.raises(CheckpointError, match="outcomes of its validation are damaged"):
            Selection().load_state_dict(state | damage)


def test_few_validation_images_are_pointed_out(digits: Dataset, tmp_path: Path) -> None:
    assert standard_error_at_half(100) == 5.0
    assert standard_error_at_half(FEW_IMAGES) == pytest.approx(3.54, abs=0.01)
    observer = Observer(fail_after=1)
    with pytest.raises(MemoryError):
        train(digits, tmp_path / "run", STANDARD, observer=observer)
    # 10 images: sqrt(0.25 / 10) = 15.8 points
    assert "10 validation images tell epochs apart poorly" in observer.warnings[0]
    assert "standard error of RA is up to 15.8 points" in observer.warnings[0]
