"""Runs with several seeds: parsing the seeds, and summarizing the results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe.errors import ConfigError

Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        help="Train once with each of these seeds, e.g. 0,1,2, and show mean and standard deviation.",
        rich_help_panel="Run",
        show_default=False,
    ),
]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from a list with commas.

    Raises:
        ConfigError: The text is no such list, or has a seed twice.
    """
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 20 for part in parts):
        raise ConfigError(f"--seeds must be a list of whole numbers such as 0,1,2, got '{text}'")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds has a seed twice: {text}")
    return seeds


def seed_folder(run: Path, seed: int) -> Path:
    """Folder of one of several runs that differ in their seed only."""
    return run / f"seed-{seed}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(figures: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every number that all runs have."""
    names = [name for name, value in figures[0].items() if isinstance(value, int | float)]
    return {
        name: dict(zip(("mean", "std"), mean_and_deviation([run[name] for run in figures]), strict=True))
        for name in names
        if all(isinstance(run.get(name), int | float) for run in figures)
    }
