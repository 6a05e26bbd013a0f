"""Random numbers are functions of their place in a run."""

import pytest
import torch

from advmoe.seeding import generator_for, seeded


def draw(seed: int, *position: int) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=generator_for(seed, *position)).tolist())


def test_the_same_place_gives_the_same_numbers() -> None:
    assert draw(7, 3, 1) == draw(7, 3, 1)


def test_different_places_give_different_numbers() -> None:
    # Places that a mere concatenation of 32-bit words would confuse are among them: trailing zeros,
    # seeds of two words.
    places = [(0,), (0, 0), (0, 0, 0), (1,), (0, 1), (1, 0), (0, 3), (0, 3, 0), (2**32, 5), (0, 1, 5), (2**63 - 1, 0)]
    assert len({draw(*place) for place in places}) == len(places)


def test_seeding_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with seeded(5):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(2), expected)
    with seeded(5):
        assert torch.equal(torch.rand(1), inside)


def test_the_global_generator_comes_back_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(5):
        torch.rand(1 // 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeding_leaves_gpus_alone_that_it_does_not_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"a GPU got seed {seed}")

    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with seeded(5):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
