"""`python -m advmoe` is the command line; `torchrun -m advmoe` starts it on every rank."""

import sys

from advmoe.cli.start import start

if __name__ == "__main__":
    sys.exit(start())
