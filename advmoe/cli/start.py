"""The entry of the command `advmoe`. It imports nothing before it handles Ctrl-C."""

from __future__ import annotations

import sys


def start() -> int:
    """Run the command line. Ctrl-C while its modules are imported gives one line, too."""
    try:
        from advmoe.cli.app import main

        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
