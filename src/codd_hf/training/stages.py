"""The stages of a run: what each needs, what it leaves, and its fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..circuits import Potentials, occupancy, token_marginal
from ..configuration_codd import CoDDHeadConfig
from ..data.canvases import TokenizedExample
from ..data.tasks import TASKS
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from .checkpoints import Checkpoints
from .fits.conditional import OF_THE_HEAD, fit_conditional
from .fits.generative import fit_generative, text_windows
from .fits.joint import fit_joint
from .fits.pretraining import fit_backbone
from .inputs import Parts, Start, TaskStream, load_start, never_generated, new_start, tokenize_parts
from .loop import History, Log
from .settings import TrainConfig

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
        self.model = CoDDModel.from_backbone(self.model.backbone, head)
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
        start = load_start(config.backbone, config.mask_token_id)
    (model, tokenizer), length = start, config.window_length
    train, validation, _ = tokenize_parts(config, start, run.examples)
    stream = TaskStream(tokenizer, config.dataset_config, config.max_length)
    data = stream if config.dataset == TASKS else train
    args = (model, tokenizer, data, validation, settings, checkpoints, log)
    return fit_backbone(*args, window_length=length), [model.backbone, tokenizer]


def fit_circuit(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Fits a circuit to the answers' windows, and makes a head of it, marginally corrected."""
    config, (model, tokenizer) = run.config, run.start
    length, size, mask = config.window_length, model.config.vocab_size, model.mask_token_id
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


def head_config(config: TrainConfig, circuit: dict[str, Any], context_size: int) -> CoDDHeadConfig:
    """The configuration of a conditioned head; raises a ValueError for a setting out of range."""
    chosen = {name: getattr(config, name) for name in (*OF_THE_HEAD, "evidence_size")}
    return CoDDHeadConfig.from_dict(circuit | chosen | {"context_size": context_size})


def condition_head(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Flattens the circuit, makes a conditioned head of it, and fits that to the frozen backbone.

    Tied emissions start as the least-squares fit of the circuit's dense ones.
    """
    config, model, circuit = run.config, run.model, run.model.coupling_head
    assert circuit is not None
    torch.manual_seed(config.conditional.seed)  # of the maps that start at random
    head = CoDDHead(head_config(config, circuit.config.to_dict(), model.config.hidden_size))
    if config.emission == "tied":
        head.bind(model.get_output_embeddings().weight)
    alpha, marginal = circuit.config.alpha, circuit.get_buffer("token_marginal")
    with torch.no_grad():
        fitted = circuit.potentials.scaled_by_marginal(marginal.log(), alpha)
        head.set_potentials(fitted, marginal, alpha=alpha)
        head.temper(config.conditional.emission_power, config.conditional.transition_power)
        if head.context_maps is not None:
            unigrams = fitted.tensors()[2].log_softmax(-1).mean(0)
            head.context_maps.start(unigrams, occupancy(fitted, config.window_length).mean(0))
    run.couple(head)
    data = (run.model, run.start.tokenizer, run.parts[0], run.parts[1])
    history = fit_conditional(*data, config.conditional, checkpoints, log)
    return history, [head]


def train_jointly(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> Result:
    """Fits backbone and head together."""
    data = (run.model, run.start.tokenizer, run.parts[0], run.parts[1])
    return fit_joint(*data, run.config.joint, checkpoints, log), []


PRETRAINING = Stage("pretraining", None, "backbone", pretrain)
GENERATIVE = Stage("generative", None, "generative/head", fit_circuit)
CONDITIONAL = Stage("conditional", GENERATIVE, "conditional/head", condition_head)
JOINT = Stage("joint", CONDITIONAL, None, train_jointly)
STAGES = (PRETRAINING, GENERATIVE, CONDITIONAL, JOINT)
