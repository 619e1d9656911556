"""Measure 9: peak extra memory of a head step, in multiples of the emission matrix.

On a CPU the sides run in a process of their own, once each, and the figure is the highest resident
size that Linux saw during the step (`VmHWM`, reset through `clear_refs`) less the resident size
before it. It counts whatever the process really held: results, temporaries, what is kept for the
next step, and the buffers of the linear algebra. On CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..circuits.reference import plain_step
from .head_step import (
    EVIDENCE,
    LLADA_8B,
    QUICK,
    Shape,
    head_step,
    random_head,
    random_window,
)
from .report import Options, Report

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(side: str, shape: Shape, options: Options) -> int:
    """Peak bytes that the first step of a side needs beyond its head and its logits.

    Args:
        side: `plain`, or one of `EVIDENCE`.
        shape: sizes of the step.
        options: device and seed.
    """
    head, window = random_head(shape, options), random_window(shape, options)
    given = (window.logits, window.tokens, window.observed)
    gc.collect()
    cuda = torch.device(options.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
    else:
        _give_back_freed_memory()  # or the step would use it again and seem to need nothing
        CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
    if side == "plain":
        result = plain_step((head.initial, head.transition, head.emission), *given)
    else:
        result = head_step(head, *given, evidence=side)
    after = torch.cuda.max_memory_allocated(options.device) if cuda else _resident("VmHWM")
    del result
    return max(after - before, 0)


def _give_back_freed_memory() -> None:
    """Asks the C library to return what it keeps for later; not every one can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    """Bytes of a line of `/proc/self/status`, which counts in KiB."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def in_own_process(tasks: list[tuple[str, Shape]], options: Options) -> list[int]:
    """`extra_bytes` of every side and shape, in a new process with as many threads as this one."""
    message = {
        "tasks": [(side, asdict(shape)) for side, shape in tasks],
        "options": asdict(options),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", __name__, json.dumps(message)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"The process that measures memory failed with {done.returncode}: {last}")
    return json.loads(done.stdout)


def measure(options: Options) -> Report:
    """Extra memory of each side per batch size."""
    cuda = torch.device(options.device).type == "cuda"
    if not cuda and not CLEAR_REFS.exists():
        raise OSError("Memory on a CPU is read from Linux's /proc, which this system has not.")
    shape = QUICK if options.quick else LLADA_8B
    emission = 4 * shape.latents * shape.vocab
    tasks = [
        (side, replace(shape, batch=batch))
        for batch in ([options.batch_size] if options.batch_size else [1, 8])
        for side in ("plain", *EVIDENCE)
    ]
    if cuda:
        extras = [extra_bytes(side, sized, options) for side, sized in tasks]
    else:
        extras = in_own_process(tasks, options)
    rows = [
        {
            "batch": sized.batch,
            "side": side,
            "peak extra, MiB": extra / 2**20,
            "emission matrices": extra / emission,
            "of these the result": 4 * sized.batch * sized.window * sized.vocab / emission,
        }
        for (side, sized), extra in zip(tasks, extras, strict=True)
    ]
    sizes = shape.as_dict() | {"dtype": "float32", "emission matrix, MiB": emission / 2**20}
    del sizes["batch"]
    how = "torch.cuda.max_memory_allocated" if cuda else "VmHWM less VmRSS, in a process of its own"
    return Report("memory", sizes, rows, notes=[f"Read from: {how}; first step of a new head."])


if __name__ == "__main__":
    MESSAGE = json.loads(sys.argv[1])
    torch.set_num_threads(MESSAGE["threads"])
    OPTIONS = Options(**MESSAGE["options"])
    print(json.dumps([extra_bytes(s, Shape(**sizes), OPTIONS) for s, sizes in MESSAGE["tasks"]]))
