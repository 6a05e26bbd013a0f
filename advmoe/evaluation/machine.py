"""The hardware and software that computed an evaluation. One that goes on elsewhere has several."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

import torch

from advmoe.evaluation.cost import hardware


class Machine(TypedDict):
    """Hardware and software of a process, as plain values."""

    device: str
    versions: dict[str, str]


def this_machine(device: torch.device) -> Machine:
    """The hardware behind a device, and the versions of the software that computes there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("advmoe", "pyautoattack"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"device": hardware(device), "versions": found}


def distinct(machines: Iterable[Machine]) -> list[Machine]:
    """Each machine once, in their order."""
    kept: list[Machine] = []
    for each in machines:
        if each not in kept:
            kept.append(each)
    return kept


def in_words(machines: Sequence[Machine]) -> Machine:
    """All machines as one: different devices and versions are listed."""
    names = dict.fromkeys(name for each in machines for name in each["versions"])
    return {
        "device": "; ".join(dict.fromkeys(each["device"] for each in machines)),
        "versions": {
            name: ", ".join(dict.fromkeys(each["versions"][name] for each in machines if name in each["versions"]))
            for name in names
        },
    }
