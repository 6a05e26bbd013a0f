"""The bridge to `advmoe_export`, a separate distribution: imports it on demand and converts its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from advmoe.cli.options import one_of_these
from advmoe.errors import AdvMoEError, ConfigError

if TYPE_CHECKING:
    from advmoe_export import Session


def exporter() -> ModuleType:
    """The package `advmoe_export`.

    Raises:
        ConfigError: `advmoe_export` is not installed.
    """
    try:
        import advmoe_export
    except ImportError as error:
        raise ConfigError(
            f"this command needs advmoe-export ({error}); install it with: pip install './export[cpu,export,serve]'"
        ) from error
    return advmoe_export


def one_of_its(names: str) -> Callable[[str], list[str]]:
    """A completion for the shell: the choices of this name in `advmoe_export.metadata`, if the package is installed."""

    def complete(incomplete: str) -> list[str]:
        try:
            from advmoe_export import metadata
        except ImportError:
            return []
        return one_of_these(getattr(metadata, names))(incomplete)

    return complete


@contextmanager
def export_errors() -> Iterator[None]:
    """Convert the exporter's errors into `AdvMoEError` with the same message."""
    package = exporter()
    try:
        yield
    except package.ExportError as error:
        raise AdvMoEError(str(error)) from error


def open_session(path: Path, providers: Sequence[str], *, threads: int | None = None) -> Session:
    """An exported model that runs on this number of threads (None: onnxruntime's choice)."""
    with export_errors():
        session: Session = exporter().Session(path, providers=tuple(providers), threads=threads)
        return session
