"""The entry of the command `advmoe`. It handles Ctrl-C before it imports anything that takes time."""

from __future__ import annotations

import sys

from advmoe.cli.called import called


def start() -> int:
    """Run the command line. Ctrl-C while its modules are imported gives one line, too."""
    try:
        from advmoe.cli.app import main

        return main()
    except KeyboardInterrupt:
        if not called():
            print("interrupted", file=sys.stderr)
        return 130
