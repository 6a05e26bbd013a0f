"""Folders in which a data set may be, given the folder that a user names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from advmoe.errors import DataError


def default_data_dir() -> Path:
    """The folder used when none is given: ``$ADVMOE_DATA_DIR``, or ``advmoe/data`` in the user's cache folder."""
    if chosen := os.environ.get("ADVMOE_DATA_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advmoe" / "data"


def check_data_dir(data_dir: Path) -> None:
    """Check that `data_dir` is a folder. The default folder may be missing; it is made when needed.

    Raises:
        DataError: `data_dir` is a file, or is missing and is not the default folder.
    """
    if data_dir.is_dir():
        return
    if data_dir.exists():
        raise DataError(f"the data folder {data_dir} is a file; give the folder it lies in", "data_dir")
    if data_dir != default_data_dir():
        raise DataError(f"the data folder {data_dir} does not exist; correct its name, or create it first", "data_dir")


def search_roots(data_dir: Path, name: str, hub_repository: str) -> Iterator[Path]:
    """Existing folders in which the layouts of data set ``name`` are looked for, in this order.

    ``data_dir`` itself, a folder of it named after the data set or after its repository on the hub,
    and the snapshots in a hub cache, the current one of the main branch first.

    Raises:
        DataError: ``data_dir`` is a file, or is missing and is not the default folder.
    """
    check_data_dir(data_dir)
    repository_name = hub_repository.rsplit("/", 1)[-1]
    candidates = [data_dir, data_dir / name, data_dir / repository_name, data_dir / hub_repository]
    candidates += _snapshots(data_dir / f"datasets--{hub_repository.replace('/', '--')}")
    for candidate in dict.fromkeys(candidates):
        if candidate.is_dir():
            yield candidate


def _snapshots(cache: Path) -> list[Path]:
    """The snapshots in a repository's hub cache: the one that `refs/main` names, then the others by name."""
    try:
        current = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        current = ""
    return sorted((cache / "snapshots").glob("*"), key=lambda snapshot: (snapshot.name != current, snapshot.name))


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
