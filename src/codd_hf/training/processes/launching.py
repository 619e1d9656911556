"""The processes of a run, as `torchrun` or `accelerate launch` started them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

PATIENCE = timedelta(weeks=1)
"""How long a process waits for another, which may train a backbone or write evidence meanwhile;
when one dies, the launcher ends the others."""

ONE_PROCESS = (
    "Note: `accelerate launch --cpu` starts one process, whatever `--num_processes` says, unless "
    "MPI is set up. For N processes on CPUs: ACCELERATE_USE_CPU=true torchrun --nproc-per-node N "
    "-m codd_hf.cli train ..."
)


def join_processes() -> Accelerator:
    """Joins this process with the others of its launch, on CPUs where there is nothing better.

    Raises:
        ValueError: Accelerate cannot join several processes on this device.
    """
    several = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = several and not torch.accelerator.is_available()
    # Told through the environment, so that each stage's own `Accelerator()` knows it as well.
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if several and accelerator.num_processes == 1:
        raise ValueError(
            f"Several processes were started, and Accelerate joins none on {accelerator.device}: "
            "set ACCELERATE_USE_CPU=true, or start one."
        )
    # `accelerate launch --cpu --num_processes N` gives its only process an address to meet others
    # at, and no place among them.
    alone = "RANK" not in os.environ and accelerator.num_processes == 1
    if alone and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        print(ONE_PROCESS)
    return accelerator
