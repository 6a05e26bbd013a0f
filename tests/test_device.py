"""Names of devices, and the GPU that each of several processes uses."""

import pytest
import torch

from advmoe.device import resolve_device
from advmoe.errors import ConfigError
from advmoe.world import processes_here, ranks_here


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [("cuda", None, "cuda:0"), ("cuda", "1", "cuda:1"), ("auto", "1", "cuda:1"), ("cuda:0", "1", "cuda:0")],
)
def test_a_process_takes_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: str | None, expected: str
) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(resolve_device(name)) == expected
    assert list(map(str, taken)) == [expected]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="'cuda:3' is not there: this machine has 1"):
        resolve_device("cuda:3")


def test_processes_of_one_machine_do_not_share_a_numbered_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match="'cuda:0' would be that of all 2 processes of this machine; use cuda"):
        resolve_device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # of a command that one of them started for itself alone
    assert str(resolve_device("cuda:0")) == "cuda:0"


def test_a_command_that_works_alone_shares_the_machine_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (processes_here(), ranks_here()) == (2, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")  # of a command that one of the four started for itself alone
    assert (processes_here(), ranks_here()) == (2, 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert (processes_here(), ranks_here()) == (1, 1)
