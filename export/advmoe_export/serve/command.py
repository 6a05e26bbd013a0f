"""The command line of the server: `advmoe-serve`, `python -m advmoe_export.serve` and `advmoe serve`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from advmoe_export.errors import ExportError, InputError, MissingPackageError
from advmoe_export.serve.config import ServeConfig

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
    for field in dataclasses.fields(ServeConfig):
        if field.name == "model":
            continue
        default: Any = field.default
        many = isinstance(default, tuple)
        options: dict[str, Any] = {"action": "append"} if many else {"type": type(default)}
        shown = ", ".join(default) if many else default
        text = field.metadata["help"] + ("" if "Default" in field.metadata["help"] else f" Default: {shown}.")
        metavar = field.name.upper() if isinstance(default, str) or many else "NUMBER"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, metavar=metavar, **options)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "provider" in given:
        given["provider"] = tuple(given["provider"])
    return ServeConfig(**given)


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
