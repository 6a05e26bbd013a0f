"""The log of a run, epoch by epoch, for tables and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "metrics.jsonl"
"""The log's name in a run's folder; an evaluation keeps a copy under the same name."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a log, one per epoch; empty if the log is missing or cannot be read."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
        return [record for line in lines if isinstance(record := json.loads(line), dict) and "epoch" in record]
    except (OSError, ValueError, RecursionError):
        return []


def robust_accuracy(record: Mapping[str, Any]) -> float:
    """RA on the validation images; its key names the steps of the attack."""
    value = next((value for name, value in record.items() if name.startswith("val_ra")), None)
    return float("nan") if value is None else float(value)
