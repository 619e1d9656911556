"""Timing on machines that are shared: sides alternate, medians are compared, rates are measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

LINE = 64
"""Bytes that a processor reads from memory together."""


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
        scattered_bytes_per_second: of cache lines of which one number is read, in the order of
            memory; default, that of a copy.
        new_bytes_per_second: of writing to memory that the system has yet to hand out, and to
            clear; default, that of a copy.
        cached_bytes_per_second: of reading again what was just read, if it is not too much to be
            kept in a cache; default, beyond measure.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: str = "float32"
    scattered_bytes_per_second: float | None = None
    new_bytes_per_second: float | None = None
    cached_bytes_per_second: float | None = None

    def limit(
        self,
        num_bytes: float,
        flops: float,
        scattered: float = 0.0,
        new: float = 0.0,
        cached: float = 0.0,
    ) -> float:
        """Least seconds for moving so many bytes and doing so many operations, overlapped.

        Args:
            num_bytes: read or written one after the other.
            flops: operations.
            scattered: bytes of cache lines of which one number is read.
            new: bytes written to new memory.
            cached: bytes that are read again.
        """
        moving = num_bytes / self.bytes_per_second
        moving += scattered / (self.scattered_bytes_per_second or self.bytes_per_second)
        moving += new / (self.new_bytes_per_second or self.bytes_per_second)
        moving += cached / (self.cached_bytes_per_second or math.inf)
        return max(moving, flops / self.flops_per_second)

    def as_dict(self) -> dict[str, float]:
        rates = {
            "copy GB/s": self.bytes_per_second / 1e9,
            f"{self.dtype} GFLOP/s": self.flops_per_second / 1e9,
        }
        for name in ("scattered", "new", "cached"):
            rate = getattr(self, f"{name}_bytes_per_second")
            rates |= {} if rate is None else {f"{name} GB/s": rate / 1e9}
        return rates


class RateProbes:
    """What `Rates` are measured by, as sides for `median_seconds`.

    A copy of 256 MiB, a product of 2048 x 2048 x 2048, a number from every fourth cache line of
    256 MiB, 128 MiB of new memory, and a sum of 4 MiB taken 32 times. On a shared machine they say
    most in turns with what they are compared with.

    Args:
        device: where to measure.
        quick: a small copy and product.
        dtype: of the product.
    """

    def __init__(
        self, device: torch.device | str, quick: bool = False, dtype: torch.dtype = torch.float32
    ):
        self.dtype = dtype
        self.numbers, self.side = (1 << 20, 256) if quick else (1 << 26, 2048)
        source = torch.ones(self.numbers, device=device)
        target = torch.empty_like(source)
        left = torch.randn(self.side, self.side, device=device).to(dtype)
        right = torch.randn(self.side, self.side, device=device).to(dtype)
        product = torch.empty_like(left)
        rows = source.view(-1, self.numbers // 512)
        spacing = 4 * LINE // source.itemsize
        lines = torch.arange(0, rows.shape[1], spacing, device=device).expand(len(rows), -1)
        self.num_lines = lines.numel()
        gathered = source.new_empty(lines.shape)
        again = source[: 1 << 20].expand(32, -1)
        self.num_again = again.numel()
        self.sides = {
            "copy": lambda: target.copy_(source),
            "product": lambda: torch.mm(left, right, out=product),
            "scattered": lambda: torch.gather(rows, 1, lines, out=gathered),
            "new": lambda: torch.empty(self.numbers // 2, device=device).fill_(1.0),
            "cached": lambda: again.sum(1),
        }

    def rates(self, seconds: Mapping[str, float]) -> Rates:
        """The rates, given the seconds of each side."""
        return Rates(
            2 * 4 * self.numbers / seconds["copy"],
            2 * self.side**3 / seconds["product"],
            str(self.dtype).split(".")[-1],
            LINE * self.num_lines / seconds["scattered"],
            4 * (self.numbers // 2) / seconds["new"],
            4 * self.num_again / seconds["cached"],
        )


def measure_rates(
    device: torch.device | str, quick: bool = False, dtype: torch.dtype = torch.float32
) -> Rates:
    """The rates by themselves; arguments as those of [`RateProbes`]."""
    probes = RateProbes(device, quick, dtype)
    return probes.rates(median_seconds(probes.sides, repeats=5, device=device))
