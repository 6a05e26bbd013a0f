"""Writes files that are never seen half-written, and locks folders to one process at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from advmoe.errors import ConfigError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, then put the file in place of `path` in one move.

    Raises:
        OSError: The file cannot be written; `path` is as it was, and the error names it. Folders that
            were made for it are gone.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        _remove_empty(made)
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _remove_empty(made)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove these folders, from the innermost one, unless another process has put something into them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def write_text_atomically(path: Path, text: str) -> None:
    """Likewise for a text, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files that killed processes left. No other process may be writing to the folder."""
    for name in names:
        for pattern in (f".{name}.*", f"{name}.*.partial"):
            for leftover in folder.glob(pattern):
                leftover.unlink(missing_ok=True)


class FolderLock:
    """A lock on a folder: one process at a time may write to it.

    The operating system releases the lock when its process ends in any way, so there are no stale
    locks. A file beside the lock names the owner for error messages.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".lock"
        self._owner = folder / ".owner"
        self._lock = FileLock(self._path, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, unless this object holds it already.

        Raises:
            ConfigError: Another process holds the lock.
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout:
            owner = "another process"
            with contextlib.suppress(OSError):  # it may just have ended, or not have written its name yet
                owner = self._owner.read_text(encoding="utf-8").strip() or owner
            raise ConfigError(
                f"{owner} is writing to {self._folder}; wait until it has ended, or choose another folder", "out"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk only the owner's name is lost, not the lock
            self._owner.write_text(f"process {os.getpid()} on host {socket.gethostname()}\n")

    def release(self) -> None:
        """Release the lock and remove its files."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
