"""Reads a pickled circuit without running anything that it names.

A pickle is a program: it names functions and calls them. Here Python's `Unpickler` meets only the
opcodes and the names that a circuit needs, and for a name it gets an inert class of this module,
which keeps what it is called with (`Call`). So nothing is imported and nothing of others is called,
numpy's constructors included; what is kept in memory is the bytes of the file and little more.
"""

import functools
import pickle
import pickletools
import re
from typing import Any, BinaryIO, Self

import numpy as np

MAX_STEPS = 100_000
"""A tied circuit over a window of a thousand tokens takes 80,000. Values that are nested this deep
can still be hashed; far deeper ones would overflow the processor's stack."""
NAMES = re.compile(
    r"(numpy\.(_core|core)\.multiarray\._reconstruct|numpy\.(_core|core)\.numeric\._frombuffer"
    r"|numpy\.ndarray|numpy\.dtype|pyjuice\.nodes\.distributions(\.\w+)?"
    r"\.(Categorical|ExternProductCategorical|SoftEvidenceCategorical))",
    re.ASCII,
)
"""The names that a circuit may ask for."""
OPCODES = re.compile(
    r"PROTO|FRAME|STOP|MARK|MEMOIZE|(LONG_)?BINGET|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1"
    r"|(SHORT_)?BINUNICODE|(SHORT_)?BINBYTES|BINBYTES8|BYTEARRAY8|EMPTY_(TUPLE|LIST|DICT)"
    r"|TUPLE[123]?|APPENDS?|SETITEMS?|STACK_GLOBAL|REDUCE|NEWOBJ|BUILD"
)
"""What Python's own pickles of such circuits have, in protocols 4 and 5."""


class Call:
    """A call that is not made: its arguments, and the state that its result would be given."""

    __match_args__ = ("name", "arguments", "state")
    name: str
    arguments: tuple
    state: Any = None

    def __new__(cls, *arguments: Any) -> Self:
        """The description of a call of `name`."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


@functools.cache
def _stand_in(name: str) -> type[Call]:
    return type(name, (Call,), {"name": name})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Call]:
        asked = f"{module}.{name}"
        if NAMES.fullmatch(asked) is None:
            raise ValueError(f"it asks for {asked[:100]!r}, which no circuit needs")
        return _stand_in(asked.rpartition(".")[2])


def unpickle(file: BinaryIO) -> Any:
    """The value that a pickle describes, with a `Call` for all that it would make.

    Raises:
        ValueError: the pickle has what no circuit has.
        Exception: of Python's many kinds, where it is damaged.
    """
    for step, (opcode, _, _) in enumerate(pickletools.genops(file)):
        if OPCODES.fullmatch(opcode.name) is None:
            raise ValueError(f"no circuit needs the opcode {opcode.name}")
        if step >= MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS:,} steps to read")
    file.seek(0)
    return _Unpickler(file).load()


def read_array(value: Any, dtype: str) -> np.ndarray:
    """The array that numpy would make, on the bytes as they are; others are a ValueError."""
    match value:
        case Call("_reconstruct", _, (1, shape, kind, False, data)):
            pass
        case Call("_frombuffer", (data, kind, shape, "C", *_)):
            pass
        case _:
            raise ValueError("it has no array where one should be")
    match kind:
        case Call("dtype", (str(code), False, True), (3, str(end), *_)) if end + code == dtype:
            return np.frombuffer(data, dtype).reshape(shape)
    raise ValueError(f"it has an array of other elements than {dtype}")
