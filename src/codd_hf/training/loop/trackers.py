"""What is told of a run while it goes on: speed, memory, and trackers through Accelerate."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from ..settings import TrainConfig

Log = Callable[[int, dict[str, float]], None]
"""Told of every step of a fit: its number, from 1, and figures of it. Where a step ends with a
validation, its figures are among them."""

PROJECT = "codd-hf"


class Speedometer:
    """Speed and memory of the steps of a fit.

    Args:
        device: where it computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._process = psutil.Process(os.getpid())
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def read(self, tokens: int) -> dict[str, float]:
        """Tokens a second of the step that ends, and the memory that this process uses.

        Args:
            tokens: tokens of the step, over all processes.

        Returns:
            `tokens_per_second`, and `memory_gb`: the peak on a GPU, what is resident on a CPU.
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = self._process.memory_info().rss
        return {"tokens_per_second": tokens / seconds, "memory_gb": held / 1e9}


def check_trackers(report_to: list[str]) -> None:
    """Raises unless the trackers' packages are installed.

    Raises:
        ValueError: one is not.
    """
    for name in report_to:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"`report_to` is {name!r}, but that package is not installed: `pip install {name}`."
            )


@contextmanager
def tracking(config: TrainConfig, stage: str) -> Iterator[Log | None]:
    """Gives what tells the trackers in `config.report_to` of a stage's steps; None without any.

    A stage is a run of its own, since its steps are counted from 1: TensorBoard finds it in
    `output_dir/logs/codd-hf-STAGE`, and it belongs to wandb's and trackio's project of that name.
    """
    names = [name for name in config.report_to if name != "none"]
    if not names:
        yield None
        return
    output = Path(config.output_dir)
    accelerator = Accelerator(log_with=names, project_dir=output / "logs")
    settings = asdict(config)
    flat = {k: v for k, v in settings.items() if not isinstance(v, dict)} | settings[stage]
    flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat.items()}
    run = {"name": output.resolve().name}
    runs = {name: run for name in ("wandb", "trackio") if name in names}
    accelerator.init_trackers(f"{PROJECT}-{stage}", flat, runs)
    try:
        yield lambda step, values: accelerator.log(values, step)
    finally:
        for tracker in accelerator.trackers:  # `end_training` would part the processes, too
            tracker.finish()
