"""Shared code of the benchmarks: their two options, CPU time, a description of the machine, and the output."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import advmoe
from advmoe.evaluation.cost import hardware


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--smoke", action="store_true", help="smallest form, which only shows that the script works")
    return made


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def machine() -> dict[str, str]:
    """A description of the machine, and versions, for the JSON object of a benchmark."""
    return {
        "machine": f"{hardware(torch.device('cpu'))} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": f"advmoe {advmoe.__version__}, torch {torch.__version__}",
    }


def emit(figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the figures as one JSON object, or one per line."""
    if as_json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}} {value:,.4g}" if isinstance(value, float) else f"{name:{width}} {value}")
