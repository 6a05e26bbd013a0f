"""Official archives: verified by checksum, read without extracting, and downloaded whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import download_url

from advmoe.data.sets import Announce, Progress
from advmoe.errors import DataError

STALLED = 60.0
"""Seconds after which a download ends if the server sends nothing."""

_downloading = threading.Lock()


@dataclass(frozen=True)
class Archive:
    """A file the authors of a data set publish."""

    file_name: str
    md5: str
    url: str
    num_bytes: int


def check_archive(path: Path, archive: Archive) -> None:
    """Check that the file at ``path`` has the published MD5 checksum. The file is not changed.

    Raises:
        DataError: The checksum differs.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if found != archive.md5:
        raise DataError(
            f"{path} is half-downloaded or damaged: its MD5 checksum is {found} ({path.stat().st_size:,} bytes),"
            f" expected {archive.md5}; remove it or download it again from {archive.url}"
        )


def read_tar_members(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """The contents of the named members of a tar archive, read into memory; nothing is extracted to disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name in names and member.isreg() and (file := tar.extractfile(member)) is not None:
                    found[member.name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a tar archive: {error}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path} lacks {missing[0]}; expected the members {', '.join(names)}")
    return found


def fetch_archive(
    archive: Archive,
    folder: Path,
    *,
    not_found: str,
    download: bool,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Path:
    """Download ``archive`` if downloads are allowed.

    Raises:
        DataError: Downloads are not allowed, or the download fails. The message begins with
            ``not_found``, unless ``announce`` has been called with it.
    """
    if not download:
        raise DataError(f"{not_found}; point the data folder at one of them or allow the download")
    if announce is not None:
        announce(f"{not_found}; downloading {archive.url} ({archive.num_bytes / 1e6:.0f} MB) to {folder}")
    try:
        return download_archive(archive, folder, progress=progress)
    except DataError as error:
        missing = f"{not_found}, and " if announce is None else ""
        raise DataError(
            f"{missing}{error}; if you have the data set, name the folder that holds it", "data_dir"
        ) from error


def download_archive(archive: Archive, folder: Path, *, progress: Progress | None = None) -> Path:
    """Download ``archive`` into ``folder`` and return its path.

    The file gets its name only after its checksum was verified.

    torchvision draws its progress bar on stderr only if ``progress`` is given.

    Raises:
        DataError: The download fails or stalls, or has the wrong checksum. Nothing of it stays.
    """
    target = folder / archive.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as unfinished,
            _downloading,  # the timeout and stderr belong to the whole process
            _socket_timeout(STALLED),
            contextlib.ExitStack() as quiet,
        ):
            if progress is not None:
                progress(f"downloading {archive.url}", 0, 1)
            else:
                quiet.enter_context(contextlib.redirect_stderr(quiet.enter_context(Path(os.devnull).open("w"))))
            download_url(archive.url, unfinished, archive.file_name, archive.md5)
            Path(unfinished, archive.file_name).replace(target)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            raise DataError(
                f"downloading {archive.url} into {folder} stalled: the server sent nothing for {STALLED:g} s; try again"
                " later, or put the file there yourself"
            ) from error
        raise DataError(f"downloading {archive.url} into {folder} failed: {_reason(error)}") from error
    if progress is not None:
        progress(f"downloading {archive.url}", 1, 1)
    return target


def _reason(error: Exception) -> str:
    """Why a download has failed. An URLError has an error of the system, which it prints in angle brackets."""
    cause = getattr(error, "reason", None)
    return str(cause if isinstance(cause, OSError) else error)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let sockets that are opened inside wait at most so long. torchvision's download sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
