"""Work that processes share in chunks, and sums that do not depend on who computed what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator


def summing_dtype(device: torch.device) -> torch.dtype:
    """float64, in which sums of chunks are the same in any order; float32 where it is missing."""
    return torch.float32 if device.type == "mps" else torch.float64


def my_part(chunks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The chunks of this process, with their numbers."""
    accelerator = Accelerator()
    for number in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        yield number, chunks[number]


def summed(
    shapes: Sequence[torch.Size],
    chunks: Sequence[Any],
    values: Callable[[int, Any], Sequence[torch.Tensor]],
    device: torch.device,
) -> list[torch.Tensor]:
    """Sums, of these shapes, of the `values` of all chunks, which the processes share."""
    sums = [torch.zeros(shape, dtype=summing_dtype(device), device=device) for shape in shapes]
    for number, chunk in my_part(chunks):
        for total, term in zip(sums, values(number, chunk), strict=True):
            total += term.detach()
    return Accelerator().reduce(sums, "sum")
