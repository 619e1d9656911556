"""Trackers, through Accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from ..settings import TrainConfig

Log = Callable[[int, dict[str, float]], None]
"""Told of every step of a fit: its number, from 1, and its figures."""

PROJECT = "codd-hf"


def check_trackers(names: list[str]) -> None:
    """Raises unless the trackers' packages are installed.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"`report_to` is {name!r}, but that package is not installed: `pip install {name}`."
            )


@contextmanager
def tracking(config: TrainConfig, stage: str) -> Iterator[Log | None]:
    """Gives the log of a stage's steps to the trackers in `config.report_to`; None without any.

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
