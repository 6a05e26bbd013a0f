"""Read the pickled batches of CIFAR without running code from the pickle.

A pickle is a program: ``pickle.load`` imports and calls whatever the pickle names. This reader lets
a pickle name only the parts of a NumPy array, and replaces these parts by inert stand-ins. NumPy's
own unpickling code therefore never sees bytes of the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from advmoe.errors import DataError

Batch = dict[str, Any]
"""Contents of a batch file. Arrays are NumPy arrays, text is ``str``."""

MARGIN = 2**20
"""Bytes that any pickle may unfold to. Names of files may be one object that is written once."""

LONGEST_CODE = 8
"""Characters of a type code that are kept. Every code that is accepted is shorter."""


def load_batch(raw: bytes, *, where: str) -> Batch:
    """The dictionary pickled in ``raw`` by Python 2 (as in the official files) or Python 3.

    Raises:
        DataError: The pickle is truncated, is no dictionary, names anything but plain containers,
            text, numbers and numeric arrays, or unfolds to a multiple of its size. The message
            starts with ``where``.
    """
    allowance = _Allowance(2 * len(raw) + MARGIN)  # bytes are counted once more when they become text
    try:
        _check_opcodes(raw)
        batch = _ArraysOnly(io.BytesIO(raw), allowance).load()
        if not isinstance(batch, dict):
            raise pickle.UnpicklingError(f"it holds a {type(batch).__name__}, not a dictionary")
        return {_text(key): _plain(value, allowance) for key, value in batch.items()}
    except Exception as error:  # a malformed pickle can raise nearly anything
        raise DataError(f"{where} is not a readable CIFAR batch (truncated, or not one at all): {error}") from error


def _check_opcodes(raw: bytes) -> None:
    """Refuse a pickle that is truncated, that holds sets, or whose lengths would make the unpickler
    reserve memory without limit. The check runs before the unpickler.
    """
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("EMPTY_SET", "ADDITEMS", "FROZENSET"):
            raise pickle.UnpicklingError("it holds a set, which no CIFAR batch needs")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(raw):
            raise pickle.UnpicklingError(f"it numbers an object {argument}, and has only {len(raw)} bytes")


class _Allowance:
    """The bytes and items that may still be copied. A pickle repeats a text or a list in two bytes,
    but each copy of it takes its whole length.
    """

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise pickle.UnpicklingError("it unfolds to a multiple of its size")


class _DtypeStandIn:
    """Stand-in for ``numpy.dtype``: stores the type code."""

    def __init__(self, code: Any = b"", *_: Any) -> None:
        self.code = _text(code[:LONGEST_CODE] if isinstance(code, bytes | str) else code)
        self.byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = _text(state[1][:1])

    def resolve(self) -> np.dtype[Any]:
        if not re.fullmatch(r"[|<>=]?[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"an array of type {self.code!r}, and not of numbers")
        return np.dtype(self.code).newbyteorder(self.byte_order)  # type: ignore[arg-type]


class _ArrayStandIn:
    """Stand-in for ``numpy.ndarray``: stores numbers and shape, and becomes an array after the
    whole pickle was read.
    """

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def resolve(self, allowance: _Allowance) -> np.ndarray[Any, Any]:
        _, shape, dtype, fortran_order, raw = self.state
        if isinstance(raw, str):
            allowance.take(len(raw))
        numbers = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.resolve())
        return numbers.reshape(shape, order="F" if fortran_order else "C")


def _reconstruct(*_: Any) -> _ArrayStandIn:
    return _ArrayStandIn()


def _frombuffer(raw: Any, dtype: _DtypeStandIn, shape: Any, order: Any) -> _ArrayStandIn:
    if not isinstance(raw, bytes | bytearray):  # bytes(n) of a number n would be n zeros
        raise pickle.UnpicklingError(f"the numbers of an array are of type {type(raw).__name__}, and not bytes")
    array = _ArrayStandIn()
    array.state = (1, shape, dtype, _text(order) == "F", raw)
    return array


def _scalar(dtype: _DtypeStandIn, raw: Any) -> Any:
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.resolve())[0]


def _no_bytes() -> bytes:
    return b""


_ALLOWED = {
    ("numpy", "ndarray"): _ArrayStandIn,
    ("numpy", "dtype"): _DtypeStandIn,
    ("__builtin__", "bytes"): _no_bytes,  # empty bytes of Python 3 in protocol 2
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},  # protocol 5
}


def _with_text_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """The unpickler's function for an opcode, preceded by a check of the keys among the arguments."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            if not isinstance(key, bytes | str):
                raise pickle.UnpicklingError(f"it has a key of type {type(key).__name__}, and not text")
        load(unpickler)

    return checked


class _ArraysOnly(pickle._Unpickler):
    """Makes containers, text and numbers, and of other objects only the parts of arrays.

    This is the unpickler that is written in Python, because it can check a key before the key is
    hashed. The time to hash nested tuples doubles with each level, and a level takes five bytes.
    """

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        opcode[0]: _with_text_keys(pickle._Unpickler.dispatch[opcode[0]], keys)
        for opcode, keys in (
            (pickle.SETITEM, slice(-2, -1)),
            (pickle.SETITEMS, slice(None, None, 2)),
            (pickle.DICT, slice(None, None, 2)),
        )
    }

    def __init__(self, file: io.BytesIO, allowance: _Allowance) -> None:
        super().__init__(file, encoding="bytes")
        self._allowance = allowance

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # the name by which Python 3 writes bytes in protocol 2
            return self._encode
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs") from None

    def _encode(self, text: str, encoding: str) -> bytes:
        if _text(encoding) != "latin1":
            raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}, and not as latin1")
        self._allowance.take(len(text))
        return text.encode("latin1")


def _text(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise pickle.UnpicklingError(f"it holds a value of type {type(value).__name__} in the place of text")
    return value.decode("latin1") if isinstance(value, bytes) else value


def _plain(value: Any, allowance: _Allowance) -> Any:
    """``value`` with stand-ins turned into arrays and byte strings of Python 2 into text.

    Lists of lists are refused: a pickle of 100 bytes can hold a list of lists with 10^9 items.
    Tuples and arrays count as lists.
    """
    if isinstance(value, _ArrayStandIn):
        return value.resolve(allowance)
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple | dict | _ArrayStandIn) for item in value):
            raise pickle.UnpicklingError("it holds a list of lists, which no CIFAR batch needs")
        allowance.take(len(value))
        return [_plain(item, allowance) for item in value]
    if isinstance(value, bytes):
        allowance.take(len(value))
        return _text(value)
    return value
