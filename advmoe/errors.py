"""Errors that a user can cause. Each message is one line: what was expected, what came, and what to do.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class AdvMoEError(Exception):
    """Base of all errors caused by input: the command line prints its message on one line and exits with 1.

    Args:
        message: The expected value, the actual value, and the remedy.
        *options: Names of the settings and parameters the message is about. The command line adds
          how to give them.
    """

    def __init__(self, message: str = "", *options: str) -> None:
        super().__init__(message)
        self.options = options


class ConfigError(AdvMoEError, ValueError):
    """An option, or a combination of options, that cannot be carried out."""


class CompilerError(ConfigError):
    """A network whose passes cannot be compiled on this machine."""


class DataError(AdvMoEError):
    """A data set, archive, image or label that is missing, truncated or of the wrong kind."""


class CheckpointError(AdvMoEError):
    """A checkpoint that is missing, corrupt, or was not written by this project."""


class LostRankError(AdvMoEError):
    """Another rank of a distributed run has ended or does not answer. That rank reports the reason;
    this one cannot know it.
    """


class NotFiniteError(AdvMoEError):
    """Logits or gradients of a network that are not finite, so that its figures would mean nothing."""


class TrainingError(AdvMoEError):
    """A training run that cannot continue, for example because its loss is no longer finite."""
