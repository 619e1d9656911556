"""Timing on machines that are shared: sides alternate, medians are compared, rates are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median

import torch

from . import Options

LINE = 64
"""Bytes that a processor reads from memory together."""

Side = Callable[[], object]


def median_seconds(
    sides: Mapping[str, Side],
    repeats: int,
    device: str = "cpu",
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
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, run in sides.items():
            for _ in range(settling):
                run()
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Rates:
    """The machine's measured rates a second, with the threads that it is given.

    Attributes:
        copy: bytes of a large copy, reads and writes counted.
        product: operations of a large matrix product.
        scattered: bytes of cache lines of which one number is read, in the order of memory.
        new: bytes written to memory that the system has yet to hand out, and to clear.
        cached: bytes read again, few enough to be kept in a cache.
    """

    copy: float
    product: float
    scattered: float
    new: float
    cached: float

    def limit(self, product: float = 0.0, **num_bytes: float) -> float:
        """Least seconds for so many operations and bytes, `copy`, `new`, ..., overlapped."""
        moving = sum(number / getattr(self, kind) for kind, number in num_bytes.items())
        return max(moving, product / self.product)

    def as_dict(self) -> dict[str, float]:
        """The rates by names with units."""
        names = {"product": "GFLOP/s"}
        return {f"{kind} {names.get(kind, 'GB/s')}": v / 1e9 for kind, v in asdict(self).items()}


def seconds_and_rates(
    sides: Mapping[str, Side], options: Options
) -> tuple[dict[str, float], Rates]:
    """Median seconds of each side, and the rates of the machine, measured in turns with them.

    A copy of 256 MiB, a product of 2048 x 2048 x 2048, a number from every fourth cache line of
    256 MiB, 128 MiB of new memory, and a sum of 4 MiB taken 32 times; less where it is to be quick.
    """
    device = options.device
    numbers, side = (1 << 20, 256) if options.quick else (1 << 26, 2048)
    source = torch.ones(numbers, device=device)
    target, square = torch.empty_like(source), torch.randn(side, side, device=device)
    product = torch.empty_like(square)
    rows = source.view(-1, numbers // 512)
    lines = torch.arange(0, rows.shape[1], 4 * LINE // source.itemsize, device=device)
    lines = lines.expand(len(rows), -1)
    gathered, again = source.new_empty(lines.shape), source[: 1 << 20].expand(32, -1)
    probes: dict[str, Side] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(square, square, out=product),
        "scattered": lambda: torch.gather(rows, 1, lines, out=gathered),
        "new": lambda: torch.empty(numbers // 2, device=device).fill_(1.0),
        "cached": lambda: again.sum(1),
    }
    amounts = {
        "copy": 8 * numbers,
        "product": 2 * side**3,
        "scattered": LINE * lines.numel(),
        "new": 2 * numbers,
        "cached": 4 * again.numel(),
    }
    seconds = median_seconds({**probes, **sides}, options.repeats, device)
    return seconds, Rates(**{kind: number / seconds[kind] for kind, number in amounts.items()})
