"""A run as a TOML file: every setting of the model, the training and the attack, and the places of its inputs.

data_dir = "/data/pets"    # optional, as is `init`, the checkpoint that the run starts from

[model]                    # fields of `ModelConfig`
arch = "resnet18"

[train]                    # fields of `TrainConfig`
dataset = "folder"
epochs = 30
specialization = "none"    # a setting without a value

[attack]                   # fields of `TrainingAttack`
eps = 0.01
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from advmoe.config import ModelConfig, TrainConfig, TrainingAttack, to_dict
from advmoe.earlier import renamed_settings
from advmoe.errors import ConfigError
from advmoe.run_paths import RUN_FILE
from advmoe.schema import Settings, check, closest, conform, fields_of, shown

NONE = "none"
"""The text for "no value" in files and options."""

SECTIONS: dict[str, type[Settings]] = {"model": ModelConfig, "train": TrainConfig, "attack": TrainingAttack}


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The contents of a file: the given settings, by section."""

    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    init: str | None = None


def read_run_file(path: Path) -> RunFile:
    """Read a run.

    Raises:
        ConfigError: The file is missing or no TOML, or it has a key or a value that no run has.
    """
    try:
        contents = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "config") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested too deep
        raise ConfigError(f"{path} is not a TOML file: {error}{_hint(path)}", "config") from error
    known = [each.name for each in dataclasses.fields(RunFile)]
    unknown = sorted(set(contents) - set(known))
    check(
        not unknown, f"{path} has the unknown entry {shown(', '.join(unknown))}; expected {', '.join(known)}", "config"
    )
    found: dict[str, Any] = {name: conform(contents[name], str, name) for name in set(contents) - set(SECTIONS)}
    for section, owner in SECTIONS.items():
        values = renamed_settings(conform(contents.get(section, {}), dict[str, Any], f"[{section}]"))
        found[section] = {name: _checked(path, section, owner, name, value) for name, value in values.items()}
    return RunFile(**found)


def _hint(path: Path) -> str:
    """What is probably wrong with a file that is no TOML, as the end of a message."""
    text, beside = path.read_text(encoding="utf-8", errors="replace"), path.with_name(RUN_FILE)
    if text.lstrip().startswith("{"):  # such as the config.json of a run
        example = beside if beside != path and beside.is_file() else RUN_FILE
        return f"; it looks like JSON, expected a file such as {example}"
    if re.search(r'^[^#\'"]*"[^"]*\\', text, flags=re.M):
        return "; a backslash in double quotes begins a special character: put a path with backslashes in single quotes"
    return ""


def run_file(model: ModelConfig, train: TrainConfig, *, data_dir: Path | None, init: Path | None) -> str:
    """The text of a file that repeats this run. It contains the seed and all defaults.

    Raises:
        ConfigError: A path is not UTF-8, as TOML has to be.
    """
    attack = train.attack
    contents = {
        name: _in_utf8(str(path if str(path).startswith("hf:") else path.resolve()), name)
        for name, path in (("data_dir", data_dir), ("init", init))
        if path is not None
    }
    sections: dict[str, Any] = {
        "model": to_dict(model),
        "train": {name: value for name, value in to_dict(train).items() if name not in {"attack", "val_attack"}},
        "attack": {field.name: getattr(attack, field.name) for field in fields_of(TrainingAttack)},
    }
    if attack.step_size == TrainingAttack(eps=attack.eps).in_training().step_size:
        sections["attack"]["step_size"] = None  # it follows another radius
    for section, values in sections.items():
        sections[section] = {name: NONE if value is None else value for name, value in values.items()}
    return tomli_w.dumps(contents | sections)


def _in_utf8(path: str, setting: str) -> str:
    """A path, unless it has bytes that are not UTF-8. Python reads such bytes from a file system as surrogates."""
    check(path.encode(errors="ignore").decode() == path, f"expected a path in UTF-8, got {path!r}; rename it", setting)
    return path


def _checked(path: Path, section: str, owner: type[Settings], name: str, value: Any) -> Any:
    """A value of a section, checked against the field of its name."""
    known = {each.name: each for each in fields_of(owner)}
    if name not in known or name in {"attack", "val_attack"}:
        raise ConfigError(f"{path}: [{section}] has no setting {shown(name)}{closest(name, known)}", "config")
    each = known[name]
    try:
        return conform(None if value == NONE else value, each.kind, each.setting.noun or name, each.setting)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", "config") from error
