"""The whole way from a data source to a coupled model that can be loaded and shared.

`train` is what `codd-hf train` calls. All processes of a launch call it; the main one writes and
prints, but for shards of evidence.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.fingerprint import weights_fingerprint
from ..evaluation.gap import measure_gap
from ..evaluation.settings import GapSettings
from ..hub.publishing import push_folder
from ..modeling_head import CoDDHead
from ..runtime.files import atomic_write
from ..runtime.locks import locked
from .card import HISTORY, open_repository, write_card
from .inputs import load_parts
from .loop.checkpoints import Checkpoints
from .loop.trackers import check_trackers, tracking
from .processes.launching import join_processes
from .result import save_held_out, save_pipeline
from .settings import TrainConfig
from .stages import GENERATIVE, PRETRAINING, STAGES, Run, Stage, head_config

GAP_RATIOS = (0.25, 0.5, 0.75, 1.0)
NOT_PUSHED = ("*.jsonl",)
"""The held-out examples are somebody's data, and stay on this machine."""


def train(config: TrainConfig) -> Path:
    """Runs the stages that `config` chooses, and writes a pipeline folder.

    Every process of a launch calls it. A stage that is complete in the output folder is not run
    again, and one that stopped goes on, unless `config.resume_from_checkpoint` says otherwise.

    Returns:
        `output_dir/pipeline`: `model/` with the head of the last stage, `scheduler/`, `tokenizer/`,
        the head of the generative fit in `stage1/` and the held-out examples as `validation.jsonl`
        and `test.jsonl`; `demo.jsonl` holds ten of them. `README.md` and `training/` say how it was
        made. `output_dir/backbone` if pretraining alone was to run.

    Raises:
        OSError: another run writes the output folder, or the Hub, which is asked before anything is
            trained, refuses what is to be pushed.
        FileNotFoundError: the dataset, the backbone or a checkpoint is not there.
        ValueError: the data cannot be used, the settings are not those of the run in the output
            folder, a stage lacks the result of an earlier one, a checkpoint is damaged, or a
            tracker is not installed.
    """
    accelerator, output = join_processes(), Path(config.output_dir)
    check_trackers(config.report_to)
    shape = {name: getattr(config, name) for name in ("num_latents", "window_length")}
    head_config(config, shape | {"vocab_size": config.num_latents}, 1)  # out of range: found here
    resume = resume_choices(config)
    with accelerator.main_process_first():  # the others find what it has converted
        run = Run(config, load_parts(config), accelerator)
    repo_id = open_repository(config) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock", f"`output_dir` {config.output_dir!r}", PartialState()):
        if any(output.glob("stage[13]")) or any(output.glob("backbone/checkpoint-*")):
            raise ValueError(
                f"`output_dir` {str(output)!r} holds a run of an earlier version, which cannot be "
                "continued: give another folder."
            )
        if accelerator.is_main_process:
            (output / "train_config.json").write_text(json.dumps(asdict(config), indent=2))
            for stage in (s for s in STAGES if resume.get(s.name) == "none"):
                for folder in (output / stage.name, output / (stage.leaves or stage.name)):
                    if folder.exists():
                        tqdm.write(f"The stage {stage.name!r} begins anew: {folder} is deleted.")
                        shutil.rmtree(folder)
        accelerator.wait_for_everyone()
        for stage in (s for s in STAGES if s.name in resume):
            _run_stage(run, stage, resume[stage.name])
            accelerator.wait_for_everyone()
        if [*resume] == [PRETRAINING.name]:
            return output / PRETRAINING.leaves
        if accelerator.is_main_process:
            _write_pipeline(run, output / "pipeline", repo_id)
        accelerator.wait_for_everyone()
    return output / "pipeline"


def _run_stage(run: Run, stage: Stage, resume: str) -> None:
    """Runs a stage on the result of the one before, and writes its result, then its history."""
    config, main = run.config, run.accelerator.is_main_process
    output = Path(config.output_dir)
    checkpoints = Checkpoints(output / stage.name, resume, config.checkpoints_total_limit)
    finished = output / stage.name / HISTORY
    if stage is PRETRAINING:
        if not main:
            return  # the main process trains it
        if resume == "latest" and finished.exists() and not checkpoints.steps():
            tqdm.write("The pretraining is complete; without checkpoints its data are not known.")
            return
    elif run.parts is None:
        run.load()
    if stage.needs not in (None, PRETRAINING):
        before = CoDDHead.from_pretrained(stage.needs.result(config))
        checkpoints.start = weights_fingerprint(before)
        run.take(before)
    with tracking(config, stage.name) as log:
        history = stage.fit(run, checkpoints, log)
    if not main:
        return
    if stage.leaves is not None:
        folder = output / stage.leaves
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        trained = [run.model.backbone, run.tokenizer]
        for part in trained if stage is PRETRAINING else [run.model.coupling_head]:
            part.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    with atomic_write(finished) as new:
        new.write_text(json.dumps(history, indent=2))


def _write_pipeline(run: Run, folder: Path, repo_id: str | None) -> None:
    config, model, tokenizer = run.config, run.model, run.tokenizer
    sizes = dict(zip(("training", "validation", "test"), map(len, run.examples), strict=True))
    card = (config, folder, model, tokenizer, repo_id, sizes)
    write_card(*card, None)
    circuit = CoDDHead.from_pretrained(GENERATIVE.result(config))
    save_pipeline(folder, model, circuit, tokenizer, getattr(torch, config.dtype))
    save_held_out(folder, *run.examples[1:])
    held_out = run.parts[2] or run.parts[1]
    problems = [e for e in held_out if len(e.answer_ids) > model.window_length]
    problems = [] if run.sharded else problems[: config.num_gap_problems]
    if problems:
        heads = {"coupled": model.coupling_head}
        gap = measure_gap(model, heads, tokenizer, problems, GapSettings(ratios=GAP_RATIOS))
        write_card(*card, gap)
    if repo_id is not None:
        options = {"ignore_patterns": NOT_PUSHED, "commit_message": "Trained with codd-hf"}
        pushed = push_folder(folder, repo_id, private=config.hub_private, **options)
        tqdm.write(f"The pipeline is on the Hub: {pushed.repo_url}")


def resume_choices(config: TrainConfig) -> dict[str, str]:
    """The meaning of `config.resume_from_checkpoint` for each stage to run.

    Raises:
        ValueError: it is the folder of no stage that is to run.
    """
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
    place = chosen.index(stage)
    before, after = chosen[:place], chosen[place + 1 :]
    return dict.fromkeys(before, "latest") | {stage: choice} | dict.fromkeys(after, "none")
