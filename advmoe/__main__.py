"""`python -m advmoe` is the command line; `torchrun -m advmoe` starts it on every rank."""

import sys


def start() -> int:
    """The command `advmoe`. Ctrl-C while its modules are imported gives one line, too."""
    try:
        from advmoe.cli.app import main

        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
