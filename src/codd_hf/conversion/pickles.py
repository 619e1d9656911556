"""Reads a pickle without running it.

A pickle is a program: Python's `Unpickler` calls the functions that the file names, with arguments
of the file. Here a call is not made but described (`Call`), a name is a name, and a long text or
array stays where it is in the file until somebody reads it (`Payload`). So reading imports nothing,
calls nothing, and takes no memory that the file has not paid for in bytes.
"""

from __future__ import annotations

import codecs
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
COPIED = 1 << 20
"""Bytes that are read at once."""
NAMES = re.compile(
    r"(numpy\.(_core|core)\.multiarray\._reconstruct|numpy\.(_core|core)\.numeric\._frombuffer"
    r"|numpy\.ndarray|numpy\.dtype|_codecs\.encode|pyjuice\.nodes\.distributions(\.\w+)?"
    r"\.(Categorical|ExternProductCategorical|SoftEvidenceCategorical))",
    re.ASCII,
)
"""The names that a circuit may ask for."""
OPCODES = {code.encode("latin-1"): known.name for code, known in pickletools.code2op.items()}
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES |= {"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}
NUMBERS = {"FRAME": 8, "BININT": 4, "BININT1": 1, "BININT2": 2}
NUMBERS |= {"BINPUT": 1, "LONG_BINPUT": 4, "BINGET": 1, "LONG_BINGET": 4}
"""Bytes of the number that follows an opcode."""
TEXTS = {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8}
BYTES = {"LONG1": 1, "SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
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
    """Bytes that stay in the file; with `is_text` they are latin-1 characters, written as UTF-8."""

    file: BinaryIO
    offset: int
    size: int
    is_text: bool = False

    @classmethod
    def of(cls, content: bytes) -> Payload:
        """One in memory."""
        return cls(io.BytesIO(content), 0, len(content))

    def read(self) -> bytearray:
        """The bytes, or those that the text stands for."""
        if not self.is_text:
            return self.part(0, self.size)
        found, decoder = bytearray(), codecs.getincrementaldecoder("utf-8")()
        for start in range(0, self.size, COPIED):
            part = self.part(start, min(COPIED, self.size - start))
            found += decoder.decode(part, final=start + COPIED >= self.size).encode("latin-1")
        return found

    def part(self, offset: int, size: int) -> bytearray:
        """Some bytes as they stand in the file."""
        buffer = bytearray(size)
        self.file.seek(self.offset + offset)
        self.file.readinto(buffer)
        return buffer


def unpickle(file: BinaryIO, steps: Iterator[int]) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

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
    memo: dict[int, Any] = {}
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
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(_known(".".join((module, last))))
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


def _known(name: str) -> Name:
    if NAMES.fullmatch(name) is None:
        raise ValueError(f"it asks for {name!r}, which no circuit needs")
    return Name(name.rpartition(".")[2])


def _opcodes(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The opcodes up to the last, with their arguments."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)

    def take(number: int) -> bytes:
        raw = file.read(number)
        if len(raw) < number:
            raise ValueError("it is cut off")
        return raw

    if take(1) != b"\x80" or not 2 <= take(1)[0] <= 5:
        raise ValueError("it is not a pickle of protocol 2 to 5")
    while True:
        code, argument = take(1), None
        name = OPCODES.get(code, repr(code))
        if name == "STOP":
            return
        if name in NUMBERS:
            raw = take(NUMBERS[name])
            argument = int.from_bytes(raw, "little", signed=name == "BININT")
        elif name in TEXTS or name in BYTES:
            length = int.from_bytes(take((TEXTS | BYTES)[name]), "little")
            argument = Payload(file, file.tell(), length, name in TEXTS)
            if length > size - file.tell():
                raise ValueError("it is cut off")
            if name == "LONG1":
                argument = int.from_bytes(take(length), "little", signed=True)
            elif name in TEXTS and length <= MAX_TEXT:
                argument = take(length).decode()
            else:
                file.seek(length, io.SEEK_CUR)
        elif name == "GLOBAL":
            lines = [file.readline(MAX_TEXT).decode() for _ in range(2)]
            argument = ".".join(line.removesuffix("\n") for line in lines)
        yield name, argument
