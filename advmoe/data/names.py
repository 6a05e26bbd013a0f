"""The names of the data sets. They are known without the modules that read images, which take seconds to import."""

from __future__ import annotations

from advmoe.errors import ConfigError
from advmoe.schema import closest

DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenet", "folder", "digits")


def check_name(name: str) -> None:
    """Check that a data set has this name.

    Raises:
        ConfigError: None has; the message names all, and the closest one.
    """
    if name not in DATASETS:
        hint = closest(name.lower().replace("-", "").replace("_", ""), DATASETS)
        raise ConfigError(f"unknown data set {name!r}: known are {', '.join(DATASETS)}{hint}")
