"""Reads a pickle without running it.

A pickle is a program: Python's `Unpickler` calls what the file names, with the arguments that the
file gives, and even numpy's own reconstruction can be asked for any amount of memory. The machine
here knows only the opcodes that lists, dictionaries, numbers, names and arrays need. It imports
nothing, calls nothing and allocates nothing that the file has not paid for in bytes: a name becomes
a member of `Global`, an array stays where it is in the file until somebody reads it, and what a
name is applied to is one of the few stand-ins below.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np

from .stand_ins import (
    COPIED,
    DISTRIBUTIONS,
    DTYPES,
    MODULES,
    Array,
    Distribution,
    Dtype,
    Global,
    Payload,
)

MAX_OPCODES = 250_000
"""A circuit over a window of a thousand tokens takes 130,000, or 200,000 if it ties nothing."""
MAX_TEXT = 512
"""Longest name or key, in bytes."""
ORDERS = ("<", ">", "|")


@dataclass
class Budget:
    """What a file may still cost, its nested pickles included.

    Attributes:
        opcodes: steps of the machine.
        encoded: bytes that protocol 2 has written as text.
    """

    opcodes: int
    encoded: int

    @classmethod
    def for_file(cls, size: int) -> Budget:
        """The budget of a file of so many bytes."""
        return cls(MAX_OPCODES, size)


def unpickle(file: BinaryIO, budget: Budget) -> Any:
    """The value that a pickle of protocol 2 to 5 describes, of plain values and stand-ins.

    Args:
        file: a seekable binary file; arrays keep reading from it.
        budget: is used up; nested pickles of the same file share it.

    Raises:
        ValueError: the pickle is damaged, or needs anything else than a circuit does.
    """
    return _Machine(file, budget).run()


class _Machine:
    def __init__(self, file: BinaryIO, budget: Budget):
        self.file = file
        self.budget = budget
        self.size = file.seek(0, io.SEEK_END)
        self.position = file.seek(0)
        self.protocol = 0
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below the open marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        header = self.take(2) if self.size > 1 else b""
        if header[:1] != b"\x80" or not 2 <= header[1] <= 5:
            self.refuse("it is not a pickle of protocol 2 to 5")
        self.protocol = header[1]
        while True:
            self.budget.opcodes -= 1
            if self.budget.opcodes < 0:
                self.refuse(f"it takes more than {MAX_OPCODES:,} steps to read")
            opcode = self.take(1)
            if opcode == b".":
                break
            step = _STEPS.get(opcode)
            if step is None:
                known = pickletools.code2op.get(opcode.decode("latin-1"))
                self.refuse(f"no circuit needs the opcode {known.name if known else opcode}")
            step(self)
        if len(self.stack) != 1 or self.outer:
            self.refuse("it does not end with one value")
        if self.position != self.size:
            self.refuse("more bytes follow the end of the pickle")
        return self.stack[0]

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{reason} (byte {self.position})")

    def take(self, number: int) -> bytes:
        self.reserve(number)
        self.position += number
        return self.file.read(number)

    def reserve(self, number: int) -> None:
        if number > self.size - self.position:
            self.refuse(f"it is cut off: {number:,} more bytes are announced than there are")

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def pop(self) -> Any:
        if not self.stack:
            self.refuse("a value is missing")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            self.refuse(f"a {kind.__name__} is missing")
        return self.stack[-1]

    def pop_to_mark(self) -> list:
        if not self.outer:
            self.refuse("a mark is missing")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def frame(self) -> None:
        self.reserve(self.number(8))

    def payload(self, width: int, is_text: bool = False) -> None:
        size = self.number(width)
        self.reserve(size)
        self.stack.append(Payload(self.file, self.position, size, is_text))
        self.position = self.file.seek(self.position + size)

    def text(self, width: int) -> None:
        size = self.number(width)
        if size <= MAX_TEXT:
            self.stack.append(self.decode(self.take(size)))
        elif self.protocol == 2:
            self.position = self.file.seek(self.position - width)
            self.payload(width, is_text=True)
        else:
            self.refuse(f"a name has {size:,} bytes")

    def decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.refuse("a name is not UTF-8")

    def long(self) -> None:
        width = self.number(1)
        if width > 8:
            self.refuse(f"a number has {width} bytes")
        self.stack.append(self.number(width, signed=True))

    def memoize(self, index: int) -> None:
        if not self.stack:
            self.refuse("a value is missing")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            self.refuse(f"the value {index} was never kept")
        self.stack.append(self.memo[index])

    def tuple_of(self, number: int) -> None:
        values = [self.pop() for _ in range(number)]
        self.stack.append(tuple(reversed(values)))

    def tuple_to_mark(self) -> None:
        values = self.pop_to_mark()
        self.stack.append(tuple(values))

    def append(self, values: list) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list) -> None:
        target, keys = self.top(dict), values[::2]
        if len(values) % 2 or any(type(key) is not str for key in keys):
            self.refuse("the keys of a dictionary are not names")
        target.update(zip(keys, values[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def global_by_line(self) -> None:
        names = []
        for _ in range(2):
            line = self.file.readline(min(MAX_TEXT, self.size - self.position))
            self.position += len(line)
            if not line.endswith(b"\n"):
                self.refuse("a name has no end")
            names.append(self.decode(line[:-1]))
        self.look_up(*names)

    def global_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("a name is not a text")
        self.look_up(module, name)

    def look_up(self, module: str, name: str) -> None:
        for known, modules in MODULES.items():
            if name == known.value and re.fullmatch(modules, module, re.ASCII):
                if known is Global.ENCODE and self.protocol != 2:
                    break
                self.stack.append(known)
                return
        self.refuse(f"it asks for {module + '.' + name!r}, which no circuit needs")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not Global:
            self.refuse("something is called that no circuit calls")
        self.stack.append(self.apply(function, arguments))

    def apply(self, function: Global, arguments: tuple) -> Any:
        """What takes the place of `function(*arguments)`."""
        types = tuple(type(argument) for argument in arguments)
        if function is Global.RECONSTRUCT and types == (Global, tuple, Payload):
            if arguments[0] is Global.NDARRAY:
                return Array()
        elif function is Global.FROM_BUFFER and types[:4] == (Payload, Dtype, tuple, str):
            payload, dtype, shape, order = arguments[:4]
            if arguments[4:] in ((), (None,)) and order in ("C", "F"):
                return self.fill(Array(), shape, dtype, order, payload)
        elif function is Global.DTYPE and types in ((str, bool, bool), (str, int, int)):
            code, align, copy = arguments
            if code not in DTYPES:
                self.refuse(f"an array has elements of type {code!r}")
            if (align, copy) == (False, True):
                return Dtype(code)
        elif function is Global.ENCODE and len(arguments) == 2 and arguments[1] == "latin1":
            return self.encode(arguments[0])
        elif function in DISTRIBUTIONS and types in ((int,), (int, bool)):
            return Distribution(function, arguments[0])
        self.refuse(f"{function.value!r} is called with arguments that no circuit gives it")

    def encode(self, text: Any) -> Payload:
        """The bytes that protocol 2 wrote as text."""
        if type(text) is str:
            size = len(text)
        elif type(text) is Payload and text.is_text:
            size = text.size
        else:
            self.refuse("something is encoded that is no text")
        self.budget.encoded -= size
        if self.budget.encoded < 0:
            self.refuse("more bytes are made than the file has")
        encoded = bytearray()
        try:
            if type(text) is str:
                encoded += text.encode("latin-1")
            else:
                decoder = codecs.getincrementaldecoder("utf-8")()
                for start in range(0, size, COPIED):
                    part = text.read(start, min(COPIED, size - start))
                    last = start + COPIED >= size
                    encoded += decoder.decode(part, final=last).encode("latin-1")
                self.file.seek(self.position)
        except UnicodeError:
            self.refuse("a text that stands for bytes is damaged")
        return Payload(io.BytesIO(encoded), 0, len(encoded))

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if cls not in DISTRIBUTIONS or arguments != ():
            self.refuse("an object is made that no circuit needs")
        self.stack.append(Distribution(cls))

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        types = tuple(type(part) for part in state) if type(state) is tuple else ()
        if type(target) is Array and target.payload is None:
            if types == (int, tuple, Dtype, bool, Payload) and state[0] == 1:
                _, shape, dtype, fortran, payload = state
                self.fill(target, shape, dtype, "F" if fortran else "C", payload)
                return
        elif type(target) is Dtype and target.numpy is None:
            plain = (int, str, *[type(None)] * 3, int, int, int)
            if types == plain and state[1] in ORDERS and state[5:] == (-1, -1, 0):
                target.numpy = np.dtype(state[1] + target.code)
                return
        elif type(target) is Distribution and target.num_cats is None and type(state) is dict:
            target.num_cats = state.get("num_cats")
            return
        self.refuse("an object is given a state that no circuit gives it")

    def fill(self, array: Array, shape: tuple, dtype: Dtype, order: str, payload: Payload) -> Array:
        try:
            array.fill(shape, dtype, order, payload)
        except ValueError as error:
            self.refuse(str(error))
        return array


def _push(make):
    return lambda machine: machine.stack.append(make(machine))


_STEPS = {
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"N": _push(lambda machine: None),
    b"\x88": _push(lambda machine: True),
    b"\x89": _push(lambda machine: False),
    b"J": _push(lambda machine: machine.number(4, signed=True)),
    b"K": _push(lambda machine: machine.number(1)),
    b"M": _push(lambda machine: machine.number(2)),
    b"\x8a": _Machine.long,
    b"\x8c": lambda machine: machine.text(1),
    b"X": lambda machine: machine.text(4),
    b"\x8d": lambda machine: machine.text(8),
    b"C": lambda machine: machine.payload(1),
    b"B": lambda machine: machine.payload(4),
    b"\x8e": lambda machine: machine.payload(8),
    b"\x96": lambda machine: machine.payload(8),
    b"]": _push(lambda machine: []),
    b"}": _push(lambda machine: {}),
    b")": _push(lambda machine: ()),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": _Machine.tuple_to_mark,
    b"a": lambda machine: machine.append([machine.pop()]),
    b"e": lambda machine: machine.append(machine.pop_to_mark()),
    b"s": _Machine.set_item,
    b"u": lambda machine: machine.set_items(machine.pop_to_mark()),
    b"q": lambda machine: machine.memoize(machine.number(1)),
    b"r": lambda machine: machine.memoize(machine.number(4)),
    b"\x94": lambda machine: machine.memoize(len(machine.memo)),
    b"h": lambda machine: machine.recall(machine.number(1)),
    b"j": lambda machine: machine.recall(machine.number(4)),
    b"c": _Machine.global_by_line,
    b"\x93": _Machine.global_by_stack,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new_object,
    b"b": _Machine.build,
}
