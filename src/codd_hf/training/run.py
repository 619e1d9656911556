"""The whole way from a data source to a coupled model that can be loaded and shared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from ..modeling_head import CoDDHead
from ..runtime.files import atomic_write
from ..runtime.locks import locked
from .checkpoints import Checkpoints
from .inputs import load_parts
from .loop import Log
from .result import HISTORY, open_repository, write_pipeline
from .settings import TrainConfig
from .stages import PRETRAINING, STAGES, Run, Stage, head_config

PATIENCE = timedelta(weeks=1)
"""How long a process waits for another, which may train a backbone or write evidence meanwhile;
when one dies, the launcher ends the others."""


def train(config: TrainConfig) -> Path:
    """Runs the stages that `config` chooses, and writes a pipeline folder.

    Every process of a launch calls it. A stage that is complete in the output folder is not run
    again, and one that stopped goes on, unless `config.resume_from_checkpoint` is "none".

    Returns:
        `output_dir/pipeline`: a pipeline, the head of the generative fit in `stage1/`, the held-out
        examples as `.jsonl`, and `README.md` and `training/` on how it was made; or
        `output_dir/backbone` if pretraining alone was to run.

    Raises:
        OSError: another run writes the output folder, the dataset or the backbone is not there, or
            the Hub refuses what is to be pushed.
        ValueError: the data cannot be used, the settings are not those of the run in the output
            folder, or a stage lacks the result of an earlier one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        # Told through the environment, so that each stage's own `Accelerator()` knows it as well.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    main, output = accelerator.is_main_process, Path(config.output_dir)
    for name in config.report_to:
        if find_spec(name) is None:
            raise ValueError(
                f"`report_to` is {name!r}, but that package is not installed: `pip install {name}`."
            )
    shape = {"num_latents": config.num_latents, "window_length": config.window_length}
    head_config(config, shape | {"vocab_size": config.num_latents}, 1)  # raises before data load
    with accelerator.main_process_first():  # the others find what it has converted
        run = Run(config, load_parts(config))
    repo_id = open_repository(config) if main else None
    output.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if stage.name in config.chosen_stages]
    with locked(output / ".lock", f"`output_dir` {config.output_dir!r}", PartialState()):
        if main:
            (output / "train_config.json").write_text(json.dumps(asdict(config), indent=2))
        for stage in chosen if main and config.resume_from_checkpoint == "none" else ():
            tqdm.write(f"The stage {stage.name!r} begins anew.")
            for folder in (stage.name, stage.leaves or stage.name):
                shutil.rmtree(output / folder, ignore_errors=True)
        for stage in chosen:
            accelerator.wait_for_everyone()
            _run_stage(run, stage)
        accelerator.wait_for_everyone()
        if chosen == [PRETRAINING]:
            return PRETRAINING.result(config)
        if main:
            write_pipeline(run, output / "pipeline", repo_id)
        accelerator.wait_for_everyone()
    return output / "pipeline"


def _run_stage(run: Run, stage: Stage) -> None:
    """Runs a stage on the result of the one before, and writes its result, then its history.

    A stage whose steps are all done makes none again.
    """
    config, main, output = run.config, PartialState().is_main_process, Path(run.config.output_dir)
    if stage is PRETRAINING and not main:
        return  # the main process trains it
    if stage.needs is not None:
        run.couple(CoDDHead.from_pretrained(stage.needs.result(config)))
    with tracking(config, stage.name) as log:
        history, result = stage.fit(run, Checkpoints(output / stage.name), log)
    if not main:
        return
    if stage.leaves is not None:
        new, folder = output / f"{stage.leaves}.new", output / stage.leaves
        shutil.rmtree(new, ignore_errors=True)
        for part in result:
            part.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    with atomic_write(output / stage.name / HISTORY) as path:
        path.write_text(json.dumps(history, indent=2))


@contextmanager
def tracking(config: TrainConfig, stage: str) -> Iterator[Log]:
    """Gives the log of a stage's steps to the trackers in `config.report_to`.

    A stage is a run of its own, in `output_dir/logs/codd-hf-STAGE` or the project of that name.
    """
    folder = f"{config.output_dir}/logs"
    accelerator = Accelerator(log_with=config.report_to or None, project_dir=folder)
    settings = {name: str(value) for name, value in vars(getattr(config, stage)).items()}
    accelerator.init_trackers(f"codd-hf-{stage}", settings)
    try:
        yield lambda step, figures: accelerator.log(figures, step)
    finally:
        for tracker in accelerator.trackers:  # `end_training` would part the processes, too
            tracker.finish()
