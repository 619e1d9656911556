"""Timing on machines that are shared: sides alternate, medians are compared, rates are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


def synchronize(device: torch.device | str) -> None:
    """Waits for what was launched on a CUDA device; nothing to wait for on others."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    warmups: int = 2,
    settling: int = 0,
) -> dict[str, float]:
    """Median wall-clock seconds of each side, run in turns (A, B, A, B, ...).

    Args:
        sides: what to time, by name.
        repeats: timed runs of each.
        device: is waited for after each run.
        warmups: runs of each that are not timed, also in turns.
        settling: runs of a side right before each that is timed, for sides that run in succession
            in practice: what another side left in the caches and the allocator then has no effect.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, run in sides.items():
            for _ in range(settling):
                run()
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Rates:
    """What this machine really does, with the threads that it is given.

    Attributes:
        bytes_per_second: of a large copy, reads and writes counted.
        flops_per_second: of a large matrix product.
        dtype: of that product.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: str = "float32"

    def limit(self, num_bytes: float, flops: float) -> float:
        """Least seconds for moving so many bytes and doing so many operations, overlapped."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)

    def as_dict(self) -> dict[str, float]:
        return {
            "copy GB/s": self.bytes_per_second / 1e9,
            f"{self.dtype} GFLOP/s": self.flops_per_second / 1e9,
        }


def measure_rates(
    device: torch.device | str, quick: bool = False, dtype: torch.dtype = torch.float32
) -> Rates:
    """Memory bandwidth by a copy of 256 MiB, the rate of a 2048 x 2048 x 2048 product in `dtype`.

    Args:
        device: where to measure.
        quick: a small copy and product.
        dtype: of the product.
    """
    numbers, side = (1 << 20, 256) if quick else (1 << 26, 2048)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(left)
    seconds = median_seconds(
        {
            "copy": lambda: target.copy_(source),
            "product": lambda: torch.mm(left, right, out=product),
        },
        repeats=5,
        device=device,
    )
    flops_per_second = 2 * side**3 / seconds["product"]
    return Rates(2 * 4 * numbers / seconds["copy"], flops_per_second, str(dtype).split(".")[-1])
