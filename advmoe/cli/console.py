"""Output of the command line: results on stdout, everything else on stderr, errors as one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from advmoe.cli.called import called
from advmoe.errors import ConfigError

WIDE = 1000
"""Width of tables in a file or a pipe, in columns, so that no row wraps and lines can be searched."""


out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def be_quiet() -> None:
    """Show only errors from now on, because another process of torchrun prints for all."""
    out.quiet = err.quiet = True


def note(message: str) -> None:
    """A line on stderr for the person watching."""
    err.print(escape(message), style="dim", highlight=False)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    err.print(f"[yellow]warning:[/] {escape(' '.join(message.split()))}", highlight=False)


def fail(message: str) -> None:
    """The one line an error gets."""
    err.quiet = False
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", highlight=False)


def stopped(message: str) -> None:
    """The last line of a command that was asked to stop, unless the command that started it prints one."""
    if called():
        return
    err.quiet = False
    err.print(escape(message), highlight=False)


def emit_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of stdout. Values that are not finite, which JSON cannot
    express, become null.
    """
    if not out.quiet:
        print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(element) for name, element in value.items()}
    return [_finite(element) for element in value] if isinstance(value, list | tuple) else value


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; the first column holds names, the others numbers."""
    table = Table(title=escape(title), title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    _show(table)


def show_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Names and values, one a row."""
    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(escape(name), escape(str(value)))
    _show(table)


def _show(table: Table) -> None:
    """Print a table, as wide as the terminal, or as $COLUMNS says, or without folding."""
    if out.is_terminal or "COLUMNS" in os.environ:
        out.print(table)
    elif not out.quiet:
        Console(soft_wrap=True, width=WIDE).print(table)


def number(text: str, what: str) -> float:
    """A number that may be written as a fraction, such as 8/255.

    Raises:
        ConfigError: The text is neither a number nor a fraction.
    """
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{what} must be a number or a fraction such as 8/255, got '{text}'") from None


def existing_folder(path: Path) -> Path:
    """The path, if its folder exists.

    Raises:
        ConfigError: The folder does not exist.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    return path
