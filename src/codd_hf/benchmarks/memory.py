"""Peak extra memory of a head step, in multiples of the emission matrix.

On a CPU the sides run in a process of their own, once each, and the figure is the highest resident
size that Linux saw during the step (`VmHWM`, reset through `clear_refs`) less the resident size
before it. It counts whatever the process really held: results, temporaries, and the buffers of the
linear algebra. On CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import ctypes
import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from .head_case import EVIDENCE, LLADA_8B, QUICK, HeadCase, Shape
from .report import Options, Report

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(side: str, shape: Shape, options: Options) -> int:
    """Peak bytes that the first step of a side needs beyond its head and its logits.

    Args:
        side: `plain`, or one of `EVIDENCE`.
        shape: sizes of the step.
        options: device and seed.
    """
    case = HeadCase(shape, options)
    gc.collect()
    cuda = torch.device(options.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
    else:
        # The step would use freed memory again and seem to need nothing.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
    result = case.plain_step() if side == "plain" else case.step(side)
    after = torch.cuda.max_memory_allocated(options.device) if cuda else _resident("VmHWM")
    del result
    return max(after - before, 0)


def _resident(name: str) -> int:
    """Bytes of a line of `/proc/self/status`, which counts in KiB."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def measure(options: Options) -> Report:
    """Extra memory of each side per batch size."""
    cuda = torch.device(options.device).type == "cuda"
    if not cuda and not CLEAR_REFS.exists():
        raise OSError("Memory on a CPU is read from Linux's /proc, which this system has not.")
    shape = QUICK if options.quick else LLADA_8B
    emission = 4 * shape.latents * shape.vocab
    tasks = [
        (side, replace(shape, batch=batch), options)
        for batch in options.batches_or(1, 8)
        for side in ("plain", *EVIDENCE)
    ]
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, threads) as process:
        extras = list((map if cuda else process.map)(extra_bytes, *zip(*tasks, strict=True)))
    rows = [
        {
            "batch": sized.batch,
            "side": side,
            "peak extra, MiB": extra / 2**20,
            "emission matrices": extra / emission,
            "of these the result": 4 * sized.batch * sized.window * sized.vocab / emission,
        }
        for (side, sized, _), extra in zip(tasks, extras, strict=True)
    ]
    sizes = shape.as_dict() | {"dtype": "float32", "emission matrix, MiB": emission / 2**20}
    del sizes["batch"]
    how = "torch.cuda.max_memory_allocated" if cuda else "VmHWM less VmRSS, in a process of its own"
    return Report("memory", sizes, rows, notes=[f"Read from: {how}; first step of a new head."])
