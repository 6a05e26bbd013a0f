"""Settings as fields of dataclasses: one line gives a setting's type, default, bounds and help.

A field is declared as `steps: Annotated[int, Setting("Gradient steps.", at_least=0)] = 2`. An
object checks types and bounds of its fields when it is made. The command line shows help and
default (`advmoe.cli.options`). Values from files are checked against the type (`conform`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

from advmoe.errors import ConfigError

T = TypeVar("T")

LONGEST_SHOWN = 60
"""Maximum length of a refused value in a message."""


@dataclass(frozen=True)
class Setting:
    """Facts about a field besides its name, type and default."""

    help: str
    """One sentence for the command line and for readers of the code."""
    _: KW_ONLY
    noun: str = ""
    """The field in messages; its name by default."""
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    usual: str = ""
    """Text at the end of a message that refuses a value, such as the customary value."""
    default: str = ""
    """Text about the default in the help, if the default depends on other settings."""
    option: bool = True
    """Whether the command line offers it."""

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        lower = f"at least {self.at_least:g}" if self.above == -math.inf else f"above {self.above:g}"
        upper = f"at most {self.at_most:.10g}" if self.below == math.inf else f"below {self.below:.10g}"
        has_lower = max(self.at_least, self.above) > -math.inf
        has_upper = min(self.at_most, self.below) < math.inf
        return " and ".join([lower] * has_lower + [upper] * has_upper)

    def allows(self, value: float) -> bool:
        """Whether a finite number is within the bounds."""
        return self.at_least <= value <= self.at_most and self.above < value < self.below


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a `Settings` class, ready to use."""

    name: str
    kind: Any
    """Its type without annotations."""
    setting: Setting
    default: Any
    """Its default, or `dataclasses.MISSING`."""
    panel: str
    """Heading of the class that declares it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all configurations: checks types, choices and bounds of every field when an object is made.

    Integers become floats and lists become tuples where the field's type requires it. Equal
    settings are therefore equal objects, whatever their source.
    """

    panel: ClassVar[str] = ""
    """Heading for these settings on the command line."""

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            object.__setattr__(self, field.name, value_of(field, getattr(self, field.name)))


def value_of(field: Field, value: Any) -> Any:
    """A value as the field's type requires it.

    Raises:
        ConfigError: It is of another type or out of bounds. The error names the field.
    """
    try:
        return conform(value, field.kind, field.setting.noun or field.name, field.setting)
    except ConfigError as error:
        raise ConfigError(str(error), *(error.options or (field.name,))) from None


def fields_of(cls: type[Any]) -> tuple[Field, ...]:
    """The fields of a configuration in the order of their declaration."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        kind, settings = hints[field.name], []
        if typing.get_origin(kind) is Annotated:
            kind, *settings = typing.get_args(kind)
        owner = next(base for base in reversed(cls.__mro__) if field.name in vars(base).get("__annotations__", {}))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        setting = settings[0] if settings else Setting("", option=False)
        found.append(
            Field(name=field.name, kind=kind, setting=setting, default=default, panel=getattr(owner, "panel", ""))
        )
    return tuple(found)


def check(condition: bool, message: str, *options: str) -> None:
    """Check a condition on some settings.

    Raises:
        ConfigError: It does not hold. The message is `message`; the error names the settings
            `options`.
    """
    if not condition:
        raise ConfigError(message, *options)


def check_unused(config: Settings, name: str, place: str, remedy: str = "") -> None:
    """Refuse a setting that differs from its default, because nothing would read it.

    Args:
        config: The configuration that has the setting.
        name: Name of the setting.
        place: The place where the setting has no effect, for the message.
        remedy: An alternative to leaving the setting out, for the message.

    Raises:
        ConfigError: The setting differs from its default.
    """
    (default,) = (field.default for field in fields_of(type(config)) if field.name == name)
    value = getattr(config, name)
    check(value == default, f"{name} {value} has no effect on {place}; leave it out{remedy}", name)


def one_of(what: str, value: str, choices: Iterable[str], *options: str) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ConfigError: `value` is another; the message names the choices and the closest one.
    """
    known = sorted(choices)
    if value in known:
        return value
    hint = closest(str(value).lower(), known)
    raise ConfigError(f"unknown {what} '{shown(value)}', expected one of: {', '.join(known)}{hint}", *options)


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name that is most like it, or nothing."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean '{near}'?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like an unknown one; None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def shown(value: Any) -> str:
    """A value as text for a message: one line of limited length."""
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def conform(value: Any, kind: Any, noun: str, setting: Setting | None = None) -> Any:
    """Check a value's type and bounds.

    Args:
        value: Anything, such as an element of a file.
        kind: A class, `Any`, `X | None`, `Literal`, `tuple`, `list` or `dict` with arguments, or a
            `Settings` class.
        noun: Name of the value, for the message.
        setting: Setting with the bounds for numbers.

    Returns:
        The value: integers as floats where floats are expected, lists as tuples, mappings as
        `Settings`.

    Raises:
        ConfigError: The value is of another type or out of bounds.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return one_of(noun, value, arguments)
    if origin in {Union, types.UnionType}:
        if value is None and types.NoneType in arguments:
            return None
        return _conform_union(value, [inner for inner in arguments if inner is not types.NoneType], noun, setting)
    if origin in {tuple, list}:
        return _conform_sequence(value, origin, arguments, noun, setting)
    if origin is dict:
        _expect(isinstance(value, Mapping), noun, "a mapping", value)
        return {
            conform(key, arguments[0], f"a key of {noun}"): conform(element, arguments[1], f"{noun}[{shown(key)}]")
            for key, element in value.items()
        }
    if kind in {int, float}:
        return _conform_number(value, kind, noun, setting or Setting(""))
    if isinstance(kind, type) and issubclass(kind, Settings) and isinstance(value, Mapping):
        return from_dict(kind, value)
    expected = {str: "a text", bool: "true or false"}.get(kind, f"a {kind.__name__}")
    _expect(isinstance(value, kind), noun, expected, value)
    return value


def _conform_union(value: Any, kinds: list[Any], noun: str, setting: Setting | None) -> Any:
    """`value` as the first of the types that it is."""
    for kind in kinds[:-1]:
        try:
            return conform(value, kind, noun, setting)
        except ConfigError:
            continue
    return conform(value, kinds[-1], noun, setting)


def _conform_sequence(value: Any, origin: type, arguments: tuple[Any, ...], noun: str, setting: Setting | None) -> Any:
    _expect(isinstance(value, list | tuple), noun, "a list", value)
    kinds = list(arguments)
    if origin is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    _expect(len(value) == len(kinds), noun, f"a list of {len(kinds)}", value)
    pairs = zip(value, kinds, strict=True)
    return origin(conform(element, kind, f"{noun}[{at}]", setting) for at, (element, kind) in enumerate(pairs))


def _conform_number(value: Any, kind: type, noun: str, setting: Setting) -> int | float:
    ending = f"; {setting.usual}" if setting.usual else ""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is int:
        _expect(whole, noun, "a whole number", value)
        number: int | float = operator.index(value)
    else:
        real = whole or (isinstance(value, numbers.Real) and not isinstance(value, bool))
        _expect(real, noun, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    finite = "" if math.isfinite(number) else "finite"
    expected = ", ".join(part for part in (finite, setting.bounds) if part)
    check(not finite and setting.allows(number), f"{noun} must be {expected}, got {shown(number)}{ending}")
    return number


def _expect(condition: bool, noun: str, expected: str, value: Any) -> None:
    check(condition, f"{noun} must be {expected}, got {shown(repr(value))} ({type(value).__name__})")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values (what `json` and `torch.load(weights_only=True)` accept)."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`. Unknown fields are an error, because ignoring them would change the
    meaning of the run.

    Raises:
        ConfigError: An unknown field, or a value the config refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in set(values) - set(fields))
    check(not unknown, f"{cls.__name__} has no field {shown(', '.join(unknown))}{_meant(unknown, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    check(not missing, f"{cls.__name__} needs a value for {', '.join(missing)}")
    return cls(**values)


def _meant(unknown: Iterable[str], fields: Mapping[str, Any]) -> str:
    hints = (closest(name, fields) for name in unknown)
    return next(filter(None, hints), "; was this written by a newer version?")


def differences(given: Any, wanted: Any) -> dict[str, str]:
    """The fields in which two configs differ, by name, as `name = given (not wanted)`. The name of an inner field
    follows that of the outer one, as in `attack.eps`.
    """
    return dict(_differences(to_dict(given), to_dict(wanted)))


def _differences(given: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in given.items():
        other = wanted[name]
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name}", f"{prefix}{name} = {value} (not {other})"
