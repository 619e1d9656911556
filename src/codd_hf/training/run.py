"""The whole way from a data source to a coupled model that can be loaded and shared.

`train` is what `codd-hf train` calls. Each stage is a function of its own that can be called alone.
All processes of a launch call it; the main one writes and prints, but for shards of evidence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from tqdm.auto import tqdm

from ..data.canvases import Example, load_examples
from ..data.tasks import TASKS
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..runtime.files import atomic_write, read_json
from ..runtime.locks import locked
from .card import measure_final_gap, open_repository, push_pipeline, write_card
from .fits.conditional import fit_conditional
from .fits.joint import fit_joint
from .loop.checkpoints import Checkpoints
from .loop.trackers import check_trackers, tracking
from .processes.launching import join_processes
from .processes.sharding import shard_backbone, wants_shards
from .result import save_held_out, save_pipeline
from .settings import TrainConfig
from .stages import (
    PRETRAINED,
    check_head_settings,
    fit_stage_one,
    known_mask_token_id,
    load_start,
    pretrain,
    start_of_stage_three,
    tokenize_parts,
)

OF_THE_START = ("alpha", "emission_power", "transition_power")
"""Settings of what the conditional fit begins with, beside those of the head itself."""
RESULTS = {
    "pretraining": ["backbone"],
    "generative": ["generative", "stage1"],
    "conditional": ["conditional", "stage3"],
    "joint": ["joint"],
}
"""What each stage leaves in the output folder, checkpoints first."""


def train(config: TrainConfig) -> Path:
    """Runs the stages that `config` chooses, and writes a pipeline folder.

    Every process of a launch calls it. A stage that is complete in the output folder is not run
    again, and one that stopped goes on, unless `config.resume_from_checkpoint` says otherwise.

    Returns:
        `output_dir/pipeline`: `model/` with the head of the last stage, `scheduler/`, `tokenizer/`,
        the stage-1 head in `stage1/` and the held-out examples as `validation.jsonl` and
        `test.jsonl`; `demo.jsonl` holds the ten of the latter (or else the former) with the most
        familiar words. `README.md` and `training/` say how it was made. `output_dir/backbone` if
        pretraining alone was to run.

    Raises:
        OSError: another run writes the output folder, or the Hub, which is asked before anything is
            trained, refuses what is to be pushed.
        FileNotFoundError: the dataset, the backbone or a checkpoint is not there.
        ValueError: the data cannot be used, the settings are not those of the run in the output
            folder, a stage lacks the result of an earlier one, a checkpoint is damaged, or a
            tracker is not installed.
    """
    accelerator = join_processes()
    output = Path(config.output_dir)
    check_trackers(config.report_to)
    check_head_settings(config)
    resume = resume_choices(config)
    with accelerator.main_process_first():  # the others find what it has converted
        examples = load_parts(config)
    repo_id = open_repository(config) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock", f"`output_dir` {config.output_dir!r}", PartialState()):
        return _train(config, output, examples, resume, repo_id, accelerator)


def _train(
    config: TrainConfig,
    output: Path,
    examples: tuple[Sequence[Example], Sequence[Example], Sequence[Example]],
    resume: dict[str, str],
    repo_id: str | None,
    accelerator: Accelerator,
) -> Path:
    """`train` in a folder that no other run writes to."""
    chosen = config.chosen_stages
    train_part, validation, test = examples
    if accelerator.is_main_process:
        (output / "train_config.json").write_text(json.dumps(asdict(config), indent=2))
        for stage in (s for s in chosen if resume[s] == "none"):
            for folder in (output / name for name in RESULTS[stage] if (output / name).exists()):
                tqdm.write(f"The stage {stage!r} begins anew: {folder} is deleted.")
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()

    if "pretraining" in chosen:
        if accelerator.is_main_process:
            if accelerator.num_processes > 1:
                tqdm.write("The backbone is trained by the main process; the others wait.")
            with tracking(config, "pretraining") as log:
                where, begin = output / "backbone", resume["pretraining"]
                pretrain(config, train_part, validation, where, begin, log)
        accelerator.wait_for_everyone()
        if chosen == ["pretraining"]:
            return output / "backbone"
    source = config.backbone
    if config.trains_backbone:
        source = str(_result(output / "backbone", "pretraining", PRETRAINED))
    model, tokenizer = load_start(source)
    mask_token_id = known_mask_token_id(config, model, tokenizer)
    # Test data too: a bad row is to be found before hours have been spent on the others.
    *parts, held_out = tokenize_parts(config, tokenizer, *examples, mask_token_id=mask_token_id)

    if "generative" in chosen:
        with tracking(config, "generative") as log:
            head = fit_stage_one(
                config, model, tokenizer, *parts, mask_token_id, resume["generative"], log
            )
        _save_head(head, output / "stage1", accelerator)
    stage_one = CoDDHead.from_pretrained(_result(output / "stage1", "generative"))
    model = CoDDModel.from_backbone(model.backbone, stage_one)

    sharded = config.shard_backbone or wants_shards(accelerator)
    if "conditional" in chosen:
        began = {name: getattr(config, name) for name in OF_THE_START}
        _check_start(output, "conditional", "generative", resume, accelerator, **began)
        head = start_of_stage_three(config, model, stage_one)
        model = CoDDModel.from_backbone(model.backbone, head)
        if sharded:
            shard_backbone(model)
        with tracking(config, "conditional") as log:
            history = fit_conditional(
                model,
                tokenizer,
                *parts,
                output,
                config.conditional,
                log,
                resume_from_checkpoint=resume["conditional"],
                checkpoints_total_limit=config.checkpoints_total_limit,
            )
        _save_head(head, output / "stage3", accelerator)
        _save_history(history, "conditional", output, accelerator)
        if sharded:
            model = CoDDModel.from_backbone(load_start(source)[0].backbone, head.cpu())

    if "joint" in chosen:
        if "conditional" not in chosen:
            head = CoDDHead.from_pretrained(_result(output / "stage3", "conditional"))
            model = CoDDModel.from_backbone(model.backbone, head)
        _check_start(output, "joint", "conditional", resume, accelerator)
        with tracking(config, "joint") as log:
            history = fit_joint(
                model,
                tokenizer,
                *parts,
                output,
                config.joint,
                log,
                resume_from_checkpoint=resume["joint"],
                checkpoints_total_limit=config.checkpoints_total_limit,
            )
        _save_history(history, "joint", output, accelerator)

    pipeline = output / "pipeline"
    if accelerator.is_main_process:
        stage_one = CoDDHead.from_pretrained(output / "stage1")
        describe = partial(write_card, config, pipeline, model, tokenizer, repo_id)
        sizes = {"training": train_part, "validation": validation, "test": test}
        sizes = {name: len(part) for name, part in sizes.items()}
        describe(sizes, None)
        save_pipeline(pipeline, model, stage_one, tokenizer, getattr(torch, config.dtype))
        save_held_out(pipeline, validation, test, tokenizer)
        if config.num_gap_problems and not sharded:
            describe(sizes, measure_final_gap(config, model, tokenizer, held_out or parts[1]))
        if repo_id is not None:
            pushed = push_pipeline(pipeline, repo_id, config.hub_private)
            tqdm.write(f"The pipeline is on the Hub: {pushed.repo_url}")
    accelerator.wait_for_everyone()
    return pipeline


def load_parts(config: TrainConfig) -> tuple[Sequence[Example], ...]:
    """Training, validation and test examples.

    Raises:
        FileNotFoundError: the dataset is not there.
        ValueError: it cannot be used.
    """
    columns = {
        "prompt_column": config.prompt_column,
        "answer_column": config.answer_column,
        "remove_pattern": config.remove_pattern,
        "dataset_config": config.dataset_config,
        "sample_by": config.sample_by,
        "skip_bad_rows": config.skip_bad_rows,
    }
    examples = load_examples(config.dataset, split=config.split, **columns)
    if config.dataset != TASKS:
        return split_examples(examples, config.num_validation, config.num_test)
    if not config.split.startswith("train"):
        raise ValueError(f"`split` of {TASKS!r} must be a part of 'train', got {config.split!r}.")
    held_out = [
        load_examples(TASKS, split=f"{name}[:{number}]", **columns) if number else []
        for name, number in (("validation", config.num_validation), ("test", config.num_test))
    ]
    return examples, *held_out


def split_examples(
    examples: Sequence[Example], num_validation: int, num_test: int
) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    """Training, validation and test examples; the last ones are held out.

    Raises:
        ValueError: nothing is left to train on, or nothing to validate on.
    """
    held_out = num_validation + num_test
    if num_validation < 1 or num_test < 0 or held_out >= len(examples):
        raise ValueError(
            f"`num_validation` ({num_validation}) and `num_test` ({num_test}) must hold out at "
            f"least one and fewer than all of the {len(examples)} examples."
        )
    first, last = len(examples) - held_out, len(examples) - num_test
    return examples[:first], examples[first:last], examples[last:]


def resume_choices(config: TrainConfig) -> dict[str, str]:
    """What `config.resume_from_checkpoint` means for each stage to run.

    Raises:
        ValueError: it is the folder of no stage that is to run.
    """
    choice, chosen = config.resume_from_checkpoint, config.chosen_stages
    if choice in ("latest", "none"):
        return dict.fromkeys(chosen, choice)
    folder = Path(choice).parent.name
    stage = next((stage for stage in chosen if RESULTS[stage][0] == folder), None)
    if stage is None:
        raise ValueError(
            "`resume_from_checkpoint` must be 'latest', 'none' or a checkpoint of a stage that is "
            f"to run, such as OUTPUT/conditional/checkpoint-200, got {choice!r} (to run: "
            f"{', '.join(chosen)})."
        )
    place = chosen.index(stage)
    before, after = chosen[:place], chosen[place + 1 :]
    return dict.fromkeys(before, "latest") | {stage: choice} | dict.fromkeys(after, "none")


def _result(folder: Path, stage: str, witness: str = "config.json") -> Path:
    """The finished result of a stage, which has a file `witness` in it.

    Raises:
        ValueError: it is not there.
    """
    if not (folder / witness).exists():
        raise ValueError(
            f"{str(folder)!r} holds no finished result of the stage {stage!r}: add {stage!r} to "
            "`stages`."
        )
    return folder


def _save_head(head: CoDDHead, folder: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        head.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    accelerator.wait_for_everyone()


def _save_history(
    history: list[dict[str, float]], stage: str, output: Path, accelerator: Accelerator
) -> None:
    if accelerator.is_main_process:
        (output / f"{stage}_history.json").write_text(json.dumps(history, indent=2))


def _check_start(
    output: Path,
    stage: str,
    before: str,
    resume: dict[str, str],
    accelerator: Accelerator,
    **settings: Any,
) -> None:
    """Refuses to continue a stage that began with something else than it would begin with now.

    That is another result of the stage before it, or other `settings` of what is between them.

    Raises:
        ValueError: it did.
    """
    path = output / "began_with.json"
    began = read_json(path) if path.exists() else {}
    now = {"result": Checkpoints(output / before).identity(), **settings}
    continued = (output / stage).exists() and resume[stage] != "none" and stage in began
    for name, value in now.items() if continued else ():
        theirs = began[stage].get(name)
        if theirs == value or value is None:
            continue
        other = f"`{name}` {theirs!r}, not {value!r}"
        if name == "result":
            other = f"another result of the stage {before!r}"
        raise ValueError(
            f"The checkpoints in {str(output / stage)!r} began with {other}: begin again with "
            f"`stages` {stage!r} and `resume_from_checkpoint` 'none'."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with atomic_write(path) as new:
            new.write_text(json.dumps(began | {stage: now}))
