"""The entry of the command `advmoe`. It handles Ctrl-C before it imports anything that takes time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from advmoe.cli.called import called


def start() -> int:
    """Run the command line. Ctrl-C while its modules are imported gives one line, too."""
    open_closed_streams()
    try:
        from advmoe.cli.app import main

        return main()
    except KeyboardInterrupt:
        if not called():
            print("interrupted", file=sys.stderr)
        return 130


def open_closed_streams() -> None:
    """Open /dev/null in place of stdin, stdout and stderr that are closed, as `>&-` and some services close them.

    Otherwise the next file that is opened would get the number of the stream, and what is written to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 open to the end
