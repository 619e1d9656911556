"""The whole way from a data source to a coupled model that can be loaded and shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator, PartialState
from tqdm.auto import tqdm

from ..modeling_head import CoDDHead
from ..runtime.files import atomic_write
from ..runtime.locks import locked
from .checkpoints import Checkpoints
from .inputs import load_parts
from .loop import Log
from .processes import join_processes
from .result import HISTORY, open_repository, write_pipeline
from .settings import TrainConfig
from .stages import PRETRAINING, STAGES, Run, Stage, head_config


def train(config: TrainConfig) -> Path:
    """Runs the stages that `config` chooses, and writes a pipeline folder.

    Every process of a launch calls it. A stage that is complete in the output folder is not run
    again, and one that stopped goes on, unless `config.resume_from_checkpoint` says otherwise.

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
    accelerator, output = join_processes(), Path(config.output_dir)
    main = accelerator.is_main_process
    for name in config.report_to:
        if find_spec(name) is None:
            raise ValueError(
                f"`report_to` is {name!r}, but that package is not installed: `pip install {name}`."
            )
    check_head_settings(config)
    resume = resume_choices(config)
    with accelerator.main_process_first():  # the others find what it has converted
        run = Run(config, load_parts(config))
    repo_id = open_repository(config) if main else None
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock", f"`output_dir` {config.output_dir!r}", PartialState()):
        if any(output.glob("stage[13]")) or any(output.glob("backbone/checkpoint-*")):
            raise ValueError(
                f"`output_dir` {str(output)!r} holds a run of an earlier version, which cannot be "
                "continued: give another folder."
            )
        if main:
            (output / "train_config.json").write_text(json.dumps(asdict(config), indent=2))
            for stage in (s for s in STAGES if resume.get(s.name) == "none"):
                tqdm.write(f"The stage {stage.name!r} begins anew.")
                for folder in (stage.name, stage.leaves or stage.name):
                    shutil.rmtree(output / folder, ignore_errors=True)
        for stage in (s for s in STAGES if s.name in resume):
            accelerator.wait_for_everyone()
            _run_stage(run, stage, resume[stage.name])
        accelerator.wait_for_everyone()
        if [*resume] == [PRETRAINING.name]:
            return PRETRAINING.result(config)
        if main:
            write_pipeline(run, output / "pipeline", repo_id)
        accelerator.wait_for_everyone()
    return output / "pipeline"


def check_head_settings(config: TrainConfig) -> None:
    """Makes a head's configuration for a stand-in vocabulary: it raises before data are loaded."""
    shape = {"num_latents": config.num_latents, "window_length": config.window_length}
    head_config(config, shape | {"vocab_size": config.num_latents}, 1)


def _run_stage(run: Run, stage: Stage, resume: str) -> None:
    """Runs a stage on the result of the one before, and writes its result, then its history.

    A stage whose steps are all done makes none again.
    """
    config, main = run.config, PartialState().is_main_process
    output = Path(config.output_dir)
    resume_from = None if resume in ("latest", "none") else Path(resume)
    checkpoints = Checkpoints(output / stage.name, resume_from, config.checkpoints_total_limit)
    if stage is PRETRAINING and not main:
        return  # the main process trains it
    if stage.needs is not None:
        run.couple(CoDDHead.from_pretrained(stage.needs.result(config)))
    with tracking(config, stage.name) as log:
        history, result = stage.fit(run, checkpoints, log)
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
def tracking(config: TrainConfig, stage: str) -> Iterator[Log | None]:
    """Gives the log of a stage's steps to the trackers in `config.report_to`; None without any.

    A stage is a run of its own, in `output_dir/logs/codd-hf-STAGE` or the project of that name.
    """
    if not config.report_to:
        yield None
        return
    output, settings = Path(config.output_dir), asdict(config)
    accelerator = Accelerator(log_with=config.report_to, project_dir=output / "logs")
    facts = {k: v for k, v in (settings | settings[stage]).items() if not isinstance(v, dict)}
    flat = {k: v if isinstance(v, int | float) else str(v) for k, v in facts.items()}
    names = {name: {"name": output.resolve().name} for name in ("wandb", "trackio")}
    accelerator.init_trackers(f"codd-hf-{stage}", flat, names)
    try:
        yield lambda step, figures: accelerator.log(figures, step)
    finally:
        for tracker in accelerator.trackers:  # `end_training` would part the processes, too
            tracker.finish()


def resume_choices(config: TrainConfig) -> dict[str, str]:
    """The meaning of `config.resume_from_checkpoint` for each stage to run."""
    choice, chosen = config.resume_from_checkpoint, config.chosen_stages
    if choice in ("latest", "none"):
        return dict.fromkeys(chosen, choice)
    stage = Path(choice).parent.name
    if stage not in chosen:
        raise ValueError(
            "`resume_from_checkpoint` must be 'latest', 'none' or a checkpoint of a stage that is "
            f"to run, such as OUTPUT/conditional/checkpoint-200, got {choice!r} (to run: "
            f"{', '.join(chosen)})."
        )
    before, after = chosen[: chosen.index(stage)], chosen[chosen.index(stage) + 1 :]
    return dict.fromkeys(before, "latest") | {stage: choice} | dict.fromkeys(after, "none")
