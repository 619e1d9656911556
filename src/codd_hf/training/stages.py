"""The stages of a run: what each needs, what it leaves, and its fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..circuits import Potentials, occupancy, token_marginal
from ..configuration_codd import CoDDHeadConfig
from ..data.canvases import TokenizedExample
from ..data.tasks import TASKS
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from .fits.conditional import fit_conditional
from .fits.generative import fit_generative, text_windows
from .fits.joint import fit_joint
from .fits.pretraining import fit_backbone
from .inputs import Parts, load_start, mask_token_of, never_generated, new_backbone, tokenize_parts
from .loop.checkpoints import Checkpoints
from .loop.steps import History
from .loop.trackers import Log
from .processes.sharding import shard_backbone, wants_shards
from .settings import TrainConfig
from .task_stream import TaskStream

OF_THE_HEAD = ("emission", "emission_rank", "conditioning", "noise_conditioning", "evidence_size")


@dataclass
class Run:
    """What the stages of a run share.

    Attributes:
        config: the settings.
        examples: the data.
        accelerator: knows the processes.
        model: the backbone, and a head once there is one.
        tokenizer: the backbone's.
        parts: the examples, tokenized.
    """

    config: TrainConfig
    examples: Parts
    accelerator: Accelerator
    model: CoDDModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    parts: list[list[TokenizedExample]] | None = None

    @property
    def sharded(self) -> bool:
        """Whether the processes share the frozen backbone."""
        return self.config.shard_backbone or wants_shards(self.accelerator)

    def load_backbone(self) -> None:
        """Reads the backbone, trained or given, and its tokenizer."""
        trained = self.config.trains_backbone
        source = str(PRETRAINING.result(self.config)) if trained else self.config.backbone
        self.model, self.tokenizer = load_start(source)
        mask = mask_token_of(self.config, self.model, self.tokenizer)
        self.model.config.mask_token_id = mask

    def load(self) -> None:
        """Reads the backbone, and the examples as it reads them."""
        self.load_backbone()
        # Test data too: a bad row is to be found before hours have been spent on the others.
        mask = self.model.config.mask_token_id
        self.parts = tokenize_parts(self.config, self.tokenizer, mask, self.examples)

    def take(self, head: CoDDHead) -> None:
        """Couples the backbone with a head."""
        self.model = CoDDModel.from_backbone(self.model.backbone, head)


@dataclass(frozen=True)
class Stage:
    """One fit of a run.

    Attributes:
        name: also of its settings in `TrainConfig`, and of the folder of its checkpoints.
        needs: the stage whose result it begins with.
        leaves: its result, in the output folder; None for the last, which is in the pipeline.
        fit: runs it, and leaves the model in the run.
    """

    name: str
    needs: Stage | None
    leaves: str | None
    fit: Callable[[Run, Checkpoints, Log | None], History]

    def result(self, config: TrainConfig) -> Path:
        """The folder of its finished result.

        Raises:
            ValueError: it is not there.
        """
        folder = Path(config.output_dir, self.leaves)
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{str(folder)!r} holds no finished result of the stage {self.name!r}: add "
                f"{self.name!r} to `stages`."
            )
        return folder


def pretrain(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> History:
    """Trains a small backbone, or the given one further."""
    config, settings = run.config, run.config.pretraining
    if config.backbone is None:
        model, tokenizer = new_backbone(config, run.examples[0])
        settings, mask = settings.completed("new"), tokenizer.mask_token_id
    else:
        start, tokenizer = load_start(config.backbone)
        model, mask = start.backbone, mask_token_of(config, start, tokenizer)
    train, validation, _ = tokenize_parts(config, tokenizer, mask, run.examples)
    if config.dataset == TASKS:
        train = TaskStream(tokenizer, config.dataset_config, config.max_length)
    parts = (tokenizer, train, validation, settings, checkpoints, log)
    history = fit_backbone(model, *parts, window_length=config.window_length, mask_token_id=mask)
    run.model, run.tokenizer = CoDDModel.from_backbone(model, mask_token_id=mask), tokenizer
    return history


def fit_circuit(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> History:
    """Fits a circuit to the answers' windows, and makes a head of it, marginally corrected."""
    config, model, length = run.config, run.model, run.config.window_length
    embeddings = model.get_output_embeddings().weight.detach().float()
    windows = [text_windows(part, length, run.tokenizer.eos_token_id) for part in run.parts[:2]]
    potentials, history = fit_generative(
        *windows, embeddings, config.num_latents, config.generative, checkpoints, log
    )
    marginal = token_marginal(potentials, length)
    # A token that the circuit has never seen gets the ratio 1: it says nothing about it.
    unseen = windows[0].flatten().bincount(minlength=len(embeddings)) == 0
    emission = torch.where(unseen, marginal.log(), potentials.emission.dense())
    mask = model.config.mask_token_id
    never = never_generated(run.tokenizer, mask)
    never |= {*range(len(run.tokenizer), model.config.vocab_size)}
    head = CoDDHead(
        CoDDHeadConfig(
            vocab_size=model.config.vocab_size,
            num_latents=config.num_latents,
            window_length=length,
            mask_token_id=mask,
            forbidden_token_ids=sorted(never - {mask}),
            base_model_name_or_path=None if config.trains_backbone else model.backbone.name_or_path,
        )
    )
    fitted = Potentials(potentials.initial, potentials.transition, emission)
    head.set_potentials(fitted, marginal, alpha=config.generative.alpha)
    run.take(head)
    return history


def head_config(config: TrainConfig, circuit: dict[str, Any], context_size: int) -> CoDDHeadConfig:
    """The configuration of a conditioned head.

    Raises:
        ValueError: a setting is out of range.
    """
    chosen = {name: getattr(config, name) for name in OF_THE_HEAD}
    return CoDDHeadConfig.from_dict(circuit | chosen | {"context_size": context_size})


@torch.no_grad()
def conditioned(config: TrainConfig, model: CoDDModel, circuit: CoDDHead) -> CoDDHead:
    """The head that the conditional fit begins with: a fitted circuit, flattened, conditioned.

    Tied emissions start as the least-squares fit of the circuit's dense ones.
    """
    torch.manual_seed(config.conditional.seed)  # of the maps that start at random
    head = CoDDHead(head_config(config, circuit.config.to_dict(), model.config.hidden_size))
    if config.emission == "tied":
        head.bind(model.get_output_embeddings().weight)
    alpha, marginal = circuit.config.alpha, circuit.token_marginal
    fitted = circuit.potentials.scaled_by_marginal(marginal.log(), alpha)
    head.set_potentials(fitted, marginal, alpha=alpha)
    head.temper(config.conditional.emission_power, config.conditional.transition_power)
    if head.context_maps is not None:
        unigrams = fitted.emission.dense().log_softmax(-1).mean(0)
        head.context_maps.start(unigrams, occupancy(fitted, config.window_length).mean(0))
    return head


def condition_head(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> History:
    """Fits the head to the frozen backbone."""
    head = conditioned(run.config, run.model, run.model.coupling_head)
    run.take(head)
    if run.sharded:
        shard_backbone(run.model)
    parts = (run.tokenizer, *run.parts[:2], run.config.conditional)
    history = fit_conditional(run.model, *parts, checkpoints, log)
    if run.sharded:
        run.load_backbone()
        run.take(head.cpu())
    return history


def train_jointly(run: Run, checkpoints: Checkpoints, log: Log | None = None) -> History:
    """Fits backbone and head together."""
    parts = (run.tokenizer, *run.parts[:2], run.config.joint)
    return fit_joint(run.model, *parts, checkpoints, log)


PRETRAINING = Stage("pretraining", None, "backbone", pretrain)
GENERATIVE = Stage("generative", PRETRAINING, "generative/head", fit_circuit)
CONDITIONAL = Stage("conditional", GENERATIVE, "conditional/head", condition_head)
JOINT = Stage("joint", CONDITIONAL, None, train_jointly)
STAGES = (PRETRAINING, GENERATIVE, CONDITIONAL, JOINT)
