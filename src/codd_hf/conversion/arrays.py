"""The arrays and distributions of a pickled circuit, from the calls that would make them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pickles import Call, Name, Payload

DTYPES = ("f2", "f4", "f8", "i4", "i8", "b1")
DISTRIBUTIONS = ("Categorical", "ExternProductCategorical", "SoftEvidenceCategorical")
MAX_AXES = 4
COPIED = 1 << 20


@dataclass(frozen=True)
class Array:
    """An array whose bytes are in the file; equal to another that reads the same bytes alike."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: str
    payload: Payload

    def numpy(self) -> np.ndarray:
        """The array in memory."""
        flat = np.frombuffer(self.payload.read(), dtype=self.dtype)
        return flat.reshape(self.shape, order=self.order)

    def parts(self) -> Iterator[np.ndarray]:
        """The elements in the file's order, `COPIED` bytes at once."""
        for start in range(0, self.payload.size, COPIED):
            part = self.payload.read(start, min(start + COPIED, self.payload.size))
            yield np.frombuffer(part, dtype=self.dtype)


def read_array(value: Any, kinds: str = "fib") -> Array:
    """The array that numpy would make, with elements of one of its `kinds`.

    Raises:
        ValueError: it is none.
    """
    match value:
        case Call(
            "_reconstruct",
            (Name("ndarray"), _, _),
            (1, tuple(shape), dtype, bool(order), Payload() as data),
        ):
            order = "F" if order else "C"
        case Call("_frombuffer", (Payload() as data, dtype, tuple(shape), str(order), *_), None):
            pass
        case _:
            raise ValueError("is no array")
    match dtype:
        case Call("dtype", (str(code), 0, 1), (3, str(end), None, None, None, -1, -1, 0)):
            if code not in DTYPES or code[0] not in kinds or end not in "<>|":
                raise ValueError(f"has elements of type {code!r}")
            dtype = np.dtype(end + code)
        case _:
            raise ValueError("has elements of an unknown type")
    numbers = all(type(number) is int and number >= 0 for number in shape)
    if order not in ("C", "F") or len(shape) > MAX_AXES or not numbers:
        raise ValueError("has a shape that no circuit's has")
    if math.prod(shape) * dtype.itemsize != data.size:
        raise ValueError(f"has a shape that does not fit its {data.size:,} bytes")
    return Array(dtype, shape, order, data)


def read_num_tokens(value: Any) -> int:
    """The number of tokens of a pickled distribution over tokens.

    Raises:
        ValueError: it is another distribution.
    """
    match value:
        case Call("Categorical", (), {"num_cats": int(number)}) if number > 0:
            return number
        case Call(str(name), (int(number), *_), _) if name in DISTRIBUTIONS and number > 0:
            return number
    raise ValueError("it is none over tokens")
