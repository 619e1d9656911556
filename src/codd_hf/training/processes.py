"""Several processes: how they begin, and what they sum together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

Chunk = TypeVar("Chunk")
PATIENCE = timedelta(weeks=1)
"""How long a process waits for another, which may train a backbone or write evidence meanwhile;
when one dies, the launcher ends the others."""


def join_processes() -> Accelerator:
    """Joins this process with the others of its launch, on CPUs where there is nothing better."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        # Told through the environment, so that each stage's own `Accelerator()` knows it as well.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def summed(
    shapes: Sequence[torch.Size],
    chunks: Sequence[Chunk],
    values: Callable[[int, Chunk], Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Sums, of these shapes, of the `values` of all chunks, which the processes share.

    In float64 (where the device has it), so that they do not depend on who computed what.
    """
    accelerator = Accelerator()
    device = accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    for number in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        for total, term in zip(sums, values(number, chunks[number]), strict=True):
            total += term.detach().to(device)
    return accelerator.reduce(sums, "sum")
