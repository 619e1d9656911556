"""Reads a pickle without running it.

A pickle is a program: Python's `Unpickler` calls the functions that the file names, with arguments
of the file. Here a call is not made but described (`Call`), a name is a name, and an array's bytes
stay in the file until somebody reads them (`Payload`). So reading imports nothing, calls nothing,
and takes no memory that the file has not paid for in bytes.
"""

from __future__ import annotations

import io
import pickletools
import re
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_STEPS = 250_000
"""A circuit over a window of a thousand tokens takes 130,000, or 200,000 if it ties nothing."""
MAX_TEXT = 512
"""Longest name or key, in bytes."""
NAMES = re.compile(
    r"(numpy\.(_core|core)\.multiarray\._reconstruct|numpy\.(_core|core)\.numeric\._frombuffer"
    r"|numpy\.ndarray|numpy\.dtype|pyjuice\.nodes\.distributions(\.\w+)?"
    r"\.(Categorical|ExternProductCategorical|SoftEvidenceCategorical))",
    re.ASCII,
)
"""The names that a circuit may ask for."""
OPCODES = {code.encode("latin-1"): known.name for code, known in pickletools.code2op.items()}
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES |= {"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}
NUMBERS = {"FRAME": 8, "BININT": 4, "BININT1": 1, "BININT2": 2, "BINGET": 1, "LONG_BINGET": 4}
"""Bytes of the number that follows an opcode."""
LENGTHS = {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "LONG1": 1}
LENGTHS |= {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
"""Bytes of the length of the text or bytes that follow."""


@dataclass(frozen=True)
class Name:
    """The last part of the name of a function or class."""

    text: str


@dataclass(eq=False)
class Call:
    """A call that is not made, and the state that its result would be given."""

    function: str
    arguments: tuple
    state: Any = None


@dataclass(frozen=True)
class Payload:
    """Bytes that stay in the file."""

    file: BinaryIO
    offset: int
    size: int

    def read(self, start: int = 0, stop: int | None = None) -> bytearray:
        """The bytes, or a part of them."""
        buffer = bytearray((self.size if stop is None else stop) - start)
        self.file.seek(self.offset + start)
        self.file.readinto(buffer)
        return buffer


def unpickle(file: BinaryIO, steps: Iterator[int]) -> Any:
    """The value that a pickle of protocol 4 or 5 (Python's since 3.8) describes.

    Args:
        file: a seekable binary file; payloads keep reading from it.
        steps: counts the opcodes, those of nested pickles too.

    Raises:
        ValueError: the pickle is damaged, or has what no circuit has.
    """
    try:
        return _run(file, steps)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"the pickle is damaged (byte {file.tell()})") from error


def _run(file: BinaryIO, steps: Iterator[int]) -> Any:
    stack: list[Any] = []
    outer: list[list] = []  # the stacks below the open marks
    memo: list[Any] = []
    for name, argument in _opcodes(file):
        if next(steps) >= MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS:,} steps to read")
        values = None
        if name in ("TUPLE", "APPENDS", "SETITEMS"):
            values, stack = stack, outer.pop()
        match name:
            case "FRAME":
                pass
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                stack.append(tuple(values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(values)))
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if values is None else values
                list.extend(stack[-1], values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(), stack.pop()][::-1] if values is None else values
                keys = map(sys.intern, values[::2])  # takes nothing but texts
                dict.update(stack[-1], zip(keys, values[1::2], strict=True))
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                asked = ".".join((module, last))
                if NAMES.fullmatch(asked) is None:
                    raise ValueError(f"it asks for {asked!r}, which no circuit needs")
                stack.append(Name(last))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(Call(function.text, tuple(arguments)))
            case "BUILD":
                state = stack.pop()
                if stack[-1].state is not None:
                    raise ValueError("an object is given a state twice")
                stack[-1].state = state
            case _ if name in VALUES:
                stack.append(copy(VALUES[name]))
            case _ if argument is not None:
                stack.append(argument)
            case _:
                raise ValueError(f"no circuit needs the opcode {name}")
    if len(stack) != 1 or outer or file.read(1):
        raise ValueError("it does not end with one value")
    return stack[0]


def _opcodes(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The opcodes up to the last, with their arguments."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)

    def take(number: int) -> bytes:
        raw = file.read(number)
        if len(raw) < number:
            raise ValueError("it is cut off")
        return raw

    if take(2) not in (b"\x80\x04", b"\x80\x05"):
        raise ValueError("it is not a pickle of protocol 4 or 5")
    while (code := take(1)) != b".":
        name, argument = OPCODES.get(code, repr(code)), None
        if name in NUMBERS:
            argument = int.from_bytes(take(NUMBERS[name]), "little", signed=name == "BININT")
        elif name in LENGTHS:
            length = int.from_bytes(take(LENGTHS[name]), "little")
            if length > size - file.tell():
                raise ValueError("it is cut off")
            if "BYTE" in name:
                argument = Payload(file, file.tell(), length)
                file.seek(length, io.SEEK_CUR)
            elif length > MAX_TEXT:
                raise ValueError(f"a name has {length:,} bytes")
            elif name == "LONG1":
                argument = int.from_bytes(take(length), "little", signed=True)
            else:
                argument = take(length).decode()
        yield name, argument
