"""The whole way from a data source to a coupled model that can be loaded and shared, by stages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from ..circuits import Potentials, occupancy, token_marginal
from ..configuration_codd import CoDDHeadConfig
from ..data.canvases import TokenizedExample
from ..data.sources import tell
from ..data.tasks import TASKS
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..runtime.files import atomic_write, locked
from .checkpoints import Checkpoints
from .fits.conditional import OF_THE_HEAD, fit_conditional
from .fits.generative import fit_generative, text_windows
from .fits.joint import fit_joint
from .fits.pretraining import fit_backbone
from .inputs import (
    Parts,
    Start,
    TaskStream,
    load_parts,
    load_start,
    never_generated,
    new_start,
    tokenize_parts,
)
from .loop import History, Log
from .result import HISTORY, open_repository, write_pipeline
from .settings import TrainConfig

PATIENCE = timedelta(weeks=1)
"""How long a process waits for another, which may train a backbone or write evidence meanwhile;
when one dies, the launcher ends the others."""
Result = tuple[History, Sequence[Any]]
"""The history of a fit, and what is to be saved in the folder of its result."""


@dataclass
class Run:
    """What the stages of a run share; the backbone and the tokens are read when they are needed."""

    config: TrainConfig
    examples: Parts

    @cached_property
    def start(self) -> Start:
        """The backbone, trained or given, and its tokenizer."""
        given = None if self.config.trains_backbone else self.config.backbone
        name = given or str(PRETRAINING.result(self.config))
        return load_start(name, self.config.mask_token_id)

    @cached_property
    def model(self) -> CoDDModel:
        """The backbone, and a head once there is one."""
        return self.start.model

    @cached_property
    def parts(self) -> list[list[TokenizedExample]]:
        """The examples, tokenized."""
        return tokenize_parts(self.config, self.start, self.examples)

    def couple(self, head: CoDDHead) -> CoDDHead:
        """Joins the backbone and a head."""
        decoding = self.model.generation_config
        self.model = CoDDModel.from_backbone(self.model.backbone, head)
        self.model.generation_config = decoding
        return head


@dataclass(frozen=True)
class Stage:
    """One fit of a run."""

    name: str  # also of its settings in `TrainConfig`, and of the folder of its checkpoints
    needs: Stage | None  # the stage whose head it begins with
    leaves: str | None  # its result, in the output folder; the last one's is in the pipeline
    fit: Callable[[Run, Checkpoints, Log | None], Result]

    def result(self, config: TrainConfig) -> Path:
        """The folder of its finished result."""
        folder = Path(config.output_dir, self.leaves or "")
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{str(folder)!r} holds no finished result of the stage {self.name!r}: add "
                f"{self.name!r} to `stages`."
            )
        return folder


def pretrain(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Trains a small backbone, or the given one further."""
    config, settings = run.config, run.config.pretraining
    if config.backbone is None:
        start, settings = new_start(config, run.examples[0]), settings.completed("new")
    else:
        start = load_start(config.backbone, config.mask_token_id, settings.noise)
    (model, tokenizer), length = start, config.window_length
    train, validation, _ = tokenize_parts(config, start, run.examples)
    stream = TaskStream(tokenizer, config.dataset_config, config.max_length)
    data = stream if config.dataset == TASKS else train
    args = (model, tokenizer, data, validation, settings, checkpoints, log)
    history, own = fit_backbone(*args, window_length=length), model.backbone.config
    # A longer canvas than it has seen would tell it of a longer answer.
    longest = max(example.length(length) - len(example.prompt_ids) for example in train)
    longest += settings.max_extra_windows * length
    own.decoding = (getattr(own, "decoding", None) or {}) | {"max_new_tokens": longest}
    return history, [model.backbone, tokenizer]


def fit_circuit(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Fits a circuit to the answers' windows, and makes a head of it, marginally corrected."""
    config, (model, tokenizer) = run.config, run.start
    length, size, mask = config.window_length, model.config.vocab_size, model.config.mask_token_id
    embeddings = model.get_output_embeddings().weight.detach().float()
    train, validation = (text_windows(p, length, tokenizer.eos_token_id) for p in run.parts[:2])
    data = (train, validation, embeddings, config.num_latents)
    fitted, history = fit_generative(*data, config.generative, checkpoints, log)
    marginal = token_marginal(fitted, length)
    # A token that the circuit has never seen gets the ratio 1: it says nothing about it.
    unseen = train.flatten().bincount(minlength=size) == 0
    emission: Any = torch.where(unseen, marginal.log(), fitted.tensors()[2])
    never = never_generated(tokenizer, mask) | {*range(len(tokenizer), size)}
    head = CoDDHead(
        CoDDHeadConfig(
            vocab_size=size,
            num_latents=config.num_latents,
            window_length=length,
            mask_token_id=mask,
            forbidden_token_ids=sorted(never - {mask}),
            base_model_name_or_path=None if config.trains_backbone else model.backbone.name_or_path,
        )
    )
    potentials = Potentials(fitted.initial, fitted.transition, emission)
    head.set_potentials(potentials, marginal, alpha=1.0)
    return history, [run.couple(head)]


def condition_head(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Flattens the circuit, makes a conditioned head of it, and fits that to the frozen backbone.

    Tied emissions start as the least-squares fit of the circuit's dense ones.
    """
    config, model, circuit = run.config, run.model, run.model.coupling_head
    assert circuit is not None
    torch.manual_seed(config.conditional.seed)  # of the maps that start at random
    head = CoDDHead(conditioned(config, circuit, model.config.hidden_size))
    model.bind_head(head)
    share = 100 * head.num_parameters() / model.backbone.num_parameters()
    tell(f"The head has {head.num_parameters():,} parameters, {share:.2g} % of the backbone's.")
    alpha, marginal = circuit.config.alpha, circuit.get_buffer("token_marginal")
    with torch.no_grad():
        circuit.set_alpha(0.0)  # as it was fitted
        fitted = circuit.potentials
        head.set_potentials(fitted, marginal, alpha=alpha)
        head.temper(config.conditional.emission_power, config.conditional.transition_power)
        if head.context_maps is not None:
            unigrams = fitted.tensors()[2].log_softmax(-1).mean(0)
            head.context_maps.start(unigrams, occupancy(fitted, config.window_length).mean(0))
    run.couple(head)
    data = (run.model, run.start.tokenizer, run.parts[0], run.parts[1])
    history = fit_conditional(*data, config.conditional, checkpoints, log)
    return history, [head]


def conditioned(config: TrainConfig, circuit: CoDDHead, context_size: int) -> CoDDHeadConfig:
    """The conditioned head that is made of a circuit; `context_size` is the backbone's width."""
    chosen = {name: getattr(config, name) for name in OF_THE_HEAD} | {"context_size": context_size}
    chosen["emission"] = config.emission or ("tied" if circuit.evidence_size else "dense")
    return CoDDHeadConfig.from_dict(circuit.config.to_dict() | chosen)


def train_jointly(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Fits backbone and head together."""
    data = (run.model, run.start.tokenizer, run.parts[0], run.parts[1])
    return fit_joint(*data, run.config.joint, checkpoints, log), []


PRETRAINING = Stage("pretraining", None, "backbone", pretrain)
GENERATIVE = Stage("generative", None, "generative/head", fit_circuit)
CONDITIONAL = Stage("conditional", GENERATIVE, "conditional/head", condition_head)
JOINT = Stage("joint", CONDITIONAL, None, train_jointly)
STAGES = (PRETRAINING, GENERATIVE, CONDITIONAL, JOINT)


def train(config: TrainConfig) -> Path:
    """Runs the stages that `config` chooses, and writes a pipeline folder.

    Every process of a launch calls it. A stage that is complete in the output folder is not run
    again, and one that stopped goes on, unless `config.resume_from_checkpoint` is "none".

    Returns:
        `output_dir/pipeline`: a pipeline, the head of the generative fit in `generative/`, the
        held-out examples as `.jsonl`, and `README.md` and `training/` on how it was made; or
        `output_dir/backbone` if pretraining alone was to run, `output_dir/head` of a DiffusionGemma
        (a head's repository).

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
        has_loop = run.model.config.canvas_length is not None  # of its own, as DiffusionGemma
        result = output / ("head" if has_loop else "pipeline")
        if main and has_loop:
            run.model.save_head(result, push_to_hub=repo_id is not None, repo_id=repo_id)
        elif main:
            write_pipeline(run, GENERATIVE.result(config), result, repo_id)
        accelerator.wait_for_everyone()
    return result


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
