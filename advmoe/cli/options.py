"""Options of the command line: options that several commands share, and options made from configurations.

Each field of a configuration (`advmoe.config`) is an option of the same name, with the field's
help, default and bounds.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from advmoe.cli.console import number
from advmoe.errors import ConfigError
from advmoe.run_file import NONE
from advmoe.schema import Field, Settings, fields_of


def one_of_these(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion for the shell: the names that begin with what has been typed, which typer gives as `incomplete`."""
    known = list(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help=(
            "Existing folder with the data set, in any layout it is published in; a missing set is downloaded to it. "
            "Default: $ADVMOE_DATA_DIR, else a folder in the user's cache."
        ),
    ),
]
SkipBadImages = Annotated[
    bool,
    typer.Option(
        "--skip-bad-images",
        help="Leave out images that cannot be decoded, and name them, instead of stopping at the first one.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", autocompletion=one_of_these(("auto", "cpu", "cuda"))),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images attacked at a time; changes nothing but memory.")]
LimitEval = Annotated[
    int | None, typer.Option("--limit-eval", help="Evaluate this many images only, always the same ones. Default: all.")
]


def flag(name: str) -> str:
    """The option that gives a setting."""
    return f"--{name.replace('_', '-')}"


def given(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def option(panel: str, text: str, *names: str, known: Iterable[str] | None = None) -> Any:
    """An option that is unset by default. The shell completes the `known` values."""
    completion = None if known is None else one_of_these(known)
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, autocompletion=completion)


def takes_settings_of(*configs: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of these configurations.

    The options replace the command's parameter `settings`, which receives the given ones as a dict.
    """
    offered = [field for config in configs for field in fields_of(config) if field.setting.option]
    names = [field.name for field in offered]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_settings(**arguments: Any) -> None:
            chosen = {name: arguments.pop(name) for name in names}
            given = {name: value for name, value in chosen.items() if value is not None}
            command(**arguments, settings={name: None if value == NONE else value for name, value in given.items()})

        own = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.parameters.items():
            parameters += map(_parameter, offered) if name == "settings" else [parameter]
        with_settings.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del with_settings.__wrapped__  # otherwise typer would see the wrapped command's parameter `settings`
        return with_settings

    return decorate


def _parameter(field: Field) -> inspect.Parameter:
    """A setting as a parameter of a command, as typer understands it."""
    kind = _plain(field.kind)
    details: dict[str, Any] = {}
    if kind is float:
        details = {"parser": functools.partial(_number, optional=_can_be_none(field)), "metavar": "<float>"}
    if choices := _choices(field):
        details = {"autocompletion": one_of_these(choices)}
    flags = f"{flag(field.name)}/--no-{flag(field.name)[2:]}" if kind is bool else flag(field.name)
    information = typer.Option(
        flags, help=" ".join(_help(field)), rich_help_panel=field.panel, show_default=False, **details
    )
    annotation = Annotated[kind | None, information]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(kind: Any) -> Any:
    """The type of a field without `None` and choices: int, float, bool or str."""
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        (kind,) = (argument for argument in typing.get_args(kind) if argument is not types.NoneType)
    return str if typing.get_origin(kind) is Literal else kind


def _choices(field: Field) -> tuple[str, ...]:
    """The values of a setting that has a fixed number of them, and otherwise nothing."""
    return typing.get_args(field.kind) if typing.get_origin(field.kind) is Literal else ()


def _can_be_none(field: Field) -> bool:
    return types.NoneType in typing.get_args(field.kind)


def _number(text: str, *, optional: bool) -> Any:
    """Parse an option for a number: a number, a fraction, or `none` if the setting may have no value."""
    if optional and text == NONE:
        return NONE
    try:
        return number(text, "the value")
    except ConfigError:
        raise typer.BadParameter(f"expected a number or a fraction such as 8/255, got '{text}'") from None


def _help(field: Field) -> Iterator[str]:
    """Help of a setting: what it is, its choices, its default."""
    yield field.setting.help
    choices = _choices(field)
    if not all(choice in field.setting.help for choice in choices):
        yield f"One of {', '.join(choices)}."
    if field.setting.default:
        yield f"Default: {field.setting.default}."
    elif field.default is not dataclasses.MISSING and field.default is not None:
        yield f"Default: {_default(field.default)}."


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
