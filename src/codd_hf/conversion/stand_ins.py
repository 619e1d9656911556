"""What stands for the objects of a pickled circuit: inert, and no larger than the file says.

Bytes stay in the file. An array knows where its own are, and reads them when it is asked to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

import numpy as np

DTYPES = {"f2": 2, "f4": 4, "f8": 8, "i4": 4, "i8": 8, "b1": 1}
"""Element types of arrays, and their bytes."""
MAX_AXES = 4
COPIED = 1 << 20
"""Elements (or bytes) that are moved at once."""


class Global(Enum):
    """The names that a circuit may ask for."""

    RECONSTRUCT = "_reconstruct"
    FROM_BUFFER = "_frombuffer"
    NDARRAY = "ndarray"
    DTYPE = "dtype"
    ENCODE = "encode"
    CATEGORICAL = "Categorical"
    EXTERN_PRODUCT_CATEGORICAL = "ExternProductCategorical"
    SOFT_EVIDENCE_CATEGORICAL = "SoftEvidenceCategorical"


MODULES = {
    Global.RECONSTRUCT: r"numpy\.(_core|core)\.multiarray",
    Global.FROM_BUFFER: r"numpy\.(_core|core)\.numeric",
    Global.NDARRAY: "numpy",
    Global.DTYPE: "numpy",
    Global.ENCODE: "_codecs",
    Global.CATEGORICAL: r"pyjuice\.nodes\.distributions(\.\w+)?",
    Global.EXTERN_PRODUCT_CATEGORICAL: r"pyjuice\.nodes\.distributions(\.\w+)?",
    Global.SOFT_EVIDENCE_CATEGORICAL: r"pyjuice\.nodes\.distributions(\.\w+)?",
}
DISTRIBUTIONS = (
    Global.CATEGORICAL,
    Global.EXTERN_PRODUCT_CATEGORICAL,
    Global.SOFT_EVIDENCE_CATEGORICAL,
)


@dataclass(frozen=True, eq=False, slots=True)
class Payload:
    """Bytes that stay in the file; `is_text` where protocol 2 wrote them as UTF-8."""

    file: BinaryIO
    offset: int
    size: int
    is_text: bool = False

    def read(self, offset: int = 0, size: int | None = None) -> bytearray:
        """A part of the bytes, all of them by default."""
        buffer = bytearray(self.size - offset if size is None else size)
        self.file.seek(self.offset + offset)
        self.file.readinto(buffer)
        return buffer


class Dtype:
    """Stand-in for `numpy.dtype`; its byte order follows in a second step."""

    __slots__ = ("code", "numpy")

    def __init__(self, code: str):
        self.code = code
        self.numpy: np.dtype | None = None


class Array:
    """Stand-in for an array; shape and bytes may follow in a second step."""

    __slots__ = ("dtype", "order", "payload", "shape")

    def __init__(self):
        self.payload: Payload | None = None

    @property
    def identity(self) -> tuple:
        """Equal for two arrays that are the same bytes of the file read in the same way."""
        where = (id(self.payload.file), self.payload.offset)
        return (*where, self.dtype.str, self.shape, self.order)

    def fill(self, shape: tuple, dtype: Dtype, order: str, payload: Payload) -> None:
        """Takes the array's description.

        Raises:
            ValueError: it is not complete, or does not fit the bytes.
        """
        if dtype.numpy is None or payload.is_text:
            raise ValueError("an array is incomplete")
        if len(shape) > MAX_AXES or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("an array has a shape that no circuit's has")
        expected = math.prod(shape) * dtype.numpy.itemsize
        if expected != payload.size:
            raise ValueError(
                f"an array of shape {shape} takes {expected:,} bytes, but has {payload.size:,}"
            )
        self.dtype, self.shape, self.order, self.payload = dtype.numpy, shape, order, payload

    def numpy(self) -> np.ndarray:
        """The array in memory."""
        flat = np.frombuffer(self.payload.read(), dtype=self.dtype)
        return flat.reshape(self.shape, order=self.order)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of the flat array and their elements, `COPIED` at a time."""
        number, width = math.prod(self.shape), self.dtype.itemsize
        for start in range(0, number, COPIED):
            stop = min(start + COPIED, number)
            part = self.payload.read(start * width, (stop - start) * width)
            yield slice(start, stop), np.frombuffer(part, dtype=self.dtype)


class Distribution:
    """Stand-in for a distribution over tokens; `num_cats` may follow in a second step."""

    __slots__ = ("kind", "num_cats")

    def __init__(self, kind: Global, num_cats: int | None = None):
        self.kind = kind
        self.num_cats = num_cats
