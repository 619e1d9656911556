"""Functions in processes of their own: several that work together, or one to be killed.

The processes are forked from a server that has imported the package once, so that they start in
no time; what they run must be a function that can be imported.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "codd_hf.cli",
        "codd_hf.pipelines.pipeline_codd",
        "codd_hf.training.run",
        "datasets",
        *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "llama", "qwen2")),
        "transformers.models.roberta.modeling_roberta",
    ]
)


def start(
    function: Callable, *args, processes: int = 1, told_cpu: bool = True
) -> list[multiprocessing.Process]:
    """Starts `function(*args)` in so many processes, as `torchrun` would.

    Unless `told_cpu`, Accelerate is not told to use the CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        variables = {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if told_cpu else {})
        if processes > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        process = CONTEXT.Process(target=_run, args=(variables, function, args), daemon=True)
        process.start()
        started.append(process)
    return started


def run(function: Callable, *args, processes: int = 1, **launch: bool) -> None:
    """Runs it to the end, and fails if one of the processes does."""
    started = start(function, *args, processes=processes, **launch)
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * processes


def _run(variables: dict[str, str], function: Callable, args: tuple) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
