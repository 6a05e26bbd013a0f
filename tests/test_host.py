"""Process settings of the command line. Settings of the user take precedence."""

import ctypes
import os
from types import SimpleNamespace

import pytest

from advmoe.host import KEPT, PRIMITIVES, prepare_process

NAMES = (
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "GLIBC_TUNABLES",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What mallopt is asked for; it refuses the large threshold for mmap, as older versions of glibc do."""
    seen: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        seen.append((parameter, value))
        return int(parameter == -1 or value <= 2**25)

    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    return seen


def test_freed_memory_and_convolutions_are_kept(calls: list[tuple[int, int]]) -> None:
    prepare_process()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(PRIMITIVES)
    assert calls == [(-1, KEPT), (-3, KEPT), (-3, 2**25)]


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_choice_in_the_environment_stands(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    prepare_process()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert calls == []


def test_a_system_without_glibc_is_left_as_it_is(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    prepare_process()
    assert calls == []
