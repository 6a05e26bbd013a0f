"""Commands that other commands start, such as the trainings of `advmoe reproduce`."""

from __future__ import annotations

import os

CALLS = {"ADVMOE_CALLED": "1"}
"""What a command adds to the environment of a command that it starts."""


def called() -> bool:
    """Whether another command has started this one. If both are stopped, that one says so, and how to go on."""
    return CALLS.items() <= os.environ.items()
