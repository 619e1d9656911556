"""The arrays and distributions of a pickled circuit, from the calls that would make them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pickles import COPIED, Call, Name, Payload

DTYPES = ("f2", "f4", "f8", "i4", "i8", "b1")
DISTRIBUTIONS = ("Categorical", "ExternProductCategorical", "SoftEvidenceCategorical")
MAX_AXES = 4


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
        """The elements in the file's order; but for texts, no more than `COPIED` bytes at once."""
        if self.payload.is_text:
            yield np.frombuffer(self.payload.read(), dtype=self.dtype)
            return
        for start in range(0, self.payload.size, COPIED):
            part = self.payload.part(start, min(COPIED, self.payload.size - start))
            yield np.frombuffer(part, dtype=self.dtype)


def read_array(value: Any) -> Array:
    """The array that numpy would make.

    Raises:
        ValueError: it is none, or none of numbers.
    """
    match value:
        case Call("_reconstruct", (Name("ndarray"), _, _), (1, tuple(shape), dtype, order, data)):
            order = {False: "C", True: "F"}.get(order if type(order) is bool else None)
        case Call("_frombuffer", (data, dtype, tuple(shape), str(order), *_), None):
            pass
        case _:
            raise ValueError("is no array")
    match dtype:
        case Call("dtype", (str(code), 0, 1), (3, str(end), None, None, None, -1, -1, 0)):
            if code not in DTYPES or end not in "<>|":
                raise ValueError(f"has elements of type {code!r}")
            dtype = np.dtype(end + code)
        case _:
            raise ValueError("has elements of an unknown type")
    data = read_bytes(data)
    if order not in ("C", "F") or len(shape) > MAX_AXES:
        raise ValueError("has a shape that no circuit's has")
    if any(type(number) is not int or number < 0 for number in shape):
        raise ValueError("has a shape that no circuit's has")
    size = math.prod(shape) * dtype.itemsize
    if size > data.size or (size < data.size and not data.is_text):
        raise ValueError(f"takes {size:,} bytes, but has {data.size:,}")
    return Array(dtype, shape, order, data)


def read_bytes(value: Any) -> Payload:
    """Bytes; protocol 2 writes them as a text and how to encode it.

    Raises:
        ValueError: it is something else.
    """
    match value:
        case Payload(is_text=False) | Call("encode", (Payload(is_text=True), "latin1"), None):
            return value if isinstance(value, Payload) else value.arguments[0]
        case Call("encode", (str(text), "latin1"), None):
            return Payload.of(text.encode("latin-1"))
    raise ValueError("is no bytes")


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
