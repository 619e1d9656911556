"""Reads a pickled circuit without running it.

A pickle is a program: Python's `Unpickler` calls the functions that the file names, with arguments
of the file. Here a call is not made but described (`Call`), a function is its name, and bytes stay
in the file until somebody reads them (`Payload`). So reading imports nothing, calls nothing, and
keeps no memory that the file has not paid for in bytes.
"""

from __future__ import annotations

import math
import pickletools
import re
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAX_STEPS = 250_000
"""A circuit over a window of a thousand tokens takes 160,000, or 230,000 if it ties nothing."""
NAMES = re.compile(
    r"(numpy\.(_core|core)\.multiarray\._reconstruct|numpy\.(_core|core)\.numeric\._frombuffer"
    r"|numpy\.ndarray|numpy\.dtype|pyjuice\.nodes\.distributions(\.\w+)?"
    r"\.(Categorical|ExternProductCategorical|SoftEvidenceCategorical))",
    re.ASCII,
)
"""The names that a circuit may ask for."""
VALUES: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES |= {"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}
PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE")
BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
ABOVE_MARK = ("TUPLE", "APPENDS", "SETITEMS")
"""Take all values above a mark."""
TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
"""Take so many values."""


@dataclass(eq=False)
class Call:
    """A call that is not made, and the state that its result would be given."""

    function: Any
    arguments: tuple
    state: Any = None


@dataclass(frozen=True)
class Payload:
    """Bytes that stay in the file."""

    file: BinaryIO
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes."""
        self.file.seek(self.offset)
        return self.file.read(self.size)


@dataclass(frozen=True)
class Array:
    """An array whose bytes are in the file; equal to another that reads the same bytes alike."""

    dtype: str
    shape: tuple[int, ...]
    payload: Payload

    def numpy(self) -> np.ndarray:
        """The array in memory."""
        return np.frombuffer(self.payload.read(), self.dtype).reshape(self.shape)


def unpickle(file: BinaryIO, steps: Iterator[int]) -> Any:
    """The value that a pickle of protocol 4 or 5 describes; `steps` counts the opcodes of several.

    Raises:
        ValueError: the pickle is damaged, or has what no circuit has.
    """
    try:
        return _run(file, steps)
    except (LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"the pickle is damaged (byte {file.tell()})") from error


def _run(file: BinaryIO, steps: Iterator[int]) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below the open marks
    memo: list[Any] = []
    opcodes: Iterator[tuple[Any, Any, Any]] = pickletools.genops(file)
    for opcode, argument, _ in opcodes:
        if next(steps) >= MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS:,} steps to read")
        name, items = opcode.name, []
        if name in ABOVE_MARK:
            items, stack = stack, below.pop()
        elif name in TAKEN:
            items = stack[-TAKEN[name] :]
            del stack[-TAKEN[name] :]
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                list.extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                keys = map(sys.intern, items[::2])  # takes nothing but texts
                dict.update(stack[-1], zip(keys, items[1::2], strict=True))
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                asked = f"{module}.{last}"
                if NAMES.fullmatch(asked) is None:
                    raise ValueError(f"it asks for {asked[:100]!r}, which no circuit needs")
                stack.append(last)
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(Call(function, tuple(arguments)))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _ if name in VALUES:
                stack.append(copy(VALUES[name]))
            case _ if name in PLAIN:
                stack.append(argument)
            case _ if name in BYTES:
                size = len(argument)
                stack.append(Payload(file, file.tell() - size, size))
            case _:
                raise ValueError(f"no circuit needs the opcode {name}")
    (value,) = stack
    return value


def read_array(value: Any, dtype: str) -> Array:
    """The array that numpy would make, with elements of the type; others are a ValueError."""
    match value:
        case Call("_reconstruct", _, (1, tuple(shape), kind, False, Payload() as data)):
            pass
        case Call("_frombuffer", (Payload() as data, kind, tuple(shape), "C", *_), None):
            pass
        case _:
            raise ValueError("is no array")
    match kind:
        case Call("dtype", (str(code), False, True), (3, str(end), *_)) if end + code == dtype:
            pass
        case _:
            raise ValueError(f"has elements of another type than {dtype}")
    if not all(type(number) is int and number >= 0 for number in shape):
        raise ValueError("has a shape that no array has")
    if math.prod(shape) * np.dtype(dtype).itemsize != data.size:
        raise ValueError(f"has a shape that does not fit its {data.size:,} bytes")
    return Array(dtype, shape, data)


def read_num_tokens(value: Any) -> int:
    """The number of tokens of a pickled distribution; raises a ValueError for another kind."""
    match value:
        case Call("Categorical", (), {"num_cats": int(number)}) if number > 0:
            return number
        case Call(_, (int(number), *_), _) if number > 0:
            return number
    raise ValueError("it is none over tokens")
