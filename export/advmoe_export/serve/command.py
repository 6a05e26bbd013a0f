"""The command line of the server: `advmoe-serve`, `python -m advmoe_export.serve` and `advmoe serve`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from advmoe_export.errors import ExportError, InputError, MissingPackageError, closest
from advmoe_export.serve.config import Option, ServeConfig, option_of

DESCRIPTION = (
    "Serve an exported model over HTTP: the Open Inference Protocol (/v2), image files (POST /classify), a page to try "
    "it (/), and Prometheus metrics (/metrics)."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see '{self.prog} --help'")


def parse(arguments: Sequence[str], program: str) -> ServeConfig:
    """Parse a command line.

    Raises:
        InputError: an option is unknown or has a wrong value.
    """
    parser = _Parser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="An exported model (.onnx).")
    names = []
    for field in dataclasses.fields(ServeConfig)[1:]:
        default, facts = field.default, option_of(field)
        many = isinstance(default, tuple)
        options: dict[str, Any] = {"action": "append"} if many else {"type": type(default)}
        metavar = facts.unit.upper() or (field.name.upper() if isinstance(default, str) or many else "NUMBER")
        names.append(f"--{field.name.replace('_', '-')}")
        parser.add_argument(names[-1], help=_help(facts, default), metavar=metavar, **options)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = closest(unknown[0].partition("=")[0], names)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    if "provider" in given:
        given["provider"] = tuple(given["provider"])
    return ServeConfig(**given)


def _help(facts: Option, default: Any) -> str:
    """The help of an option: what it is, its bounds, its default."""
    shown = (
        ", ".join(default) if isinstance(default, tuple) else f"{default:g}" if isinstance(default, float) else default
    )
    bounds = [f"{facts.bounds.capitalize()}."] if facts.bounds else []
    return " ".join([facts.help, *bounds, *([] if "Default" in facts.help else [f"Default: {shown}."])])


def run(arguments: Sequence[str], *, program: str) -> None:
    """Parse a command line, and serve until SIGTERM or Ctrl-C.

    Raises:
        ExportError: a mistake of the user.
    """
    config = parse(arguments, program)
    try:
        from advmoe_export.serve.server import serve
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"serving needs the package '{error.name}', which is not installed; "
            "install it with: pip install 'advmoe-export[cpu,serve]', or [gpu,serve] on a machine with CUDA"
        ) from error
    serve(config, announce=lambda line: print(line, file=sys.stderr, flush=True))


def main() -> int:
    """Run the command. Returns the exit code: 0 after a stop, 1 after a mistake of the user, 130 after Ctrl-C before
    the server ran.
    """
    try:
        run(sys.argv[1:], program="advmoe-serve")
    except ExportError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the server handles it while it runs
        print("interrupted", file=sys.stderr)
        return 130
    return 0
