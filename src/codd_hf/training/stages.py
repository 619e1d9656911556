"""The stages of a run, each with the run's settings: what stands between their functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..circuits import Potentials, occupancy, token_marginal
from ..configuration_codd import CoDDHeadConfig
from ..coupling.adapters import active_adapter
from ..data.canvases import Example, TokenizedExample, tokenize_examples
from ..data.rows import RowReport
from ..data.tasks import TASKS
from ..data.tokenizers import train_tokenizer
from ..hub.repositories import locate
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.files import atomic_write
from .fits.generative import fit_generative, text_windows
from .fits.pretraining import (
    finetune_backbone,
    finetuning_config,
    pretrain_backbone,
    small_backbone_config,
)
from .loop.checkpoints import Checkpoints
from .loop.trackers import Log
from .settings import PretrainingConfig, TrainConfig
from .task_stream import TaskStream

PRETRAINED = "pretraining_history.json"
"""Written beside a backbone once it is complete."""


def load_start(name: str) -> tuple[CoDDModel, PreTrainedTokenizerBase]:
    """A backbone without a head, in float32, and its tokenizer.

    Args:
        name: a folder or Hub id of a backbone, or of a CoDD model, pipeline or head, of which the
            backbone is taken.

    Raises:
        OSError: nothing is found.
        ValueError: the backbone carries a LoRA, or there is no tokenizer.
    """
    if locate(name).config.get("model_type") not in ("codd", "codd-head"):
        model = CoDDModel.from_backbone(name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name)
    pipe = CoDDPipeline.from_pretrained(name, dtype=torch.float32)
    if active_adapter(pipe.model) is not None:
        raise ValueError(
            f"`backbone` {name!r} carries a LoRA: merge it (`model.backbone.merge_adapter`) and "
            "save the backbone, or name the backbone that it was made for."
        )
    if pipe.tokenizer is None:
        raise ValueError(f"`backbone` {name!r} has no tokenizer: save one beside the model.")
    mask_token_id = pipe.model.config.mask_token_id
    return CoDDModel.from_backbone(pipe.model.backbone, mask_token_id=mask_token_id), pipe.tokenizer


def known_mask_token_id(
    config: TrainConfig, model: CoDDModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The mask token: the settings', the model's or the tokenizer's.

    Raises:
        ValueError: none of them names one.
    """
    known = (config.mask_token_id, model.config.mask_token_id, tokenizer.mask_token_id)
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise ValueError("`mask_token_id` must be given: the tokenizer has no mask token.")
    if not 0 <= found < model.config.vocab_size:
        raise ValueError(
            f"`mask_token_id` must be one of the backbone's {model.config.vocab_size} tokens, got "
            f"{found}."
        )
    return found


def never_generated(tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> set[int]:
    """Padding, mask and all special tokens but end-of-text, and the token of unknown characters."""
    never = {mask_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids}
    return never - {tokenizer.eos_token_id, None}


def tokenize_parts(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *parts: Sequence[Example],
    mask_token_id: int,
) -> list[list[TokenizedExample]]:
    """Each part of the examples, tokenized as the run's settings say."""
    return [
        tokenize_examples(
            part,
            tokenizer,
            config.max_length,
            packing=config.packing,
            mask_token_id=mask_token_id,
            never=never_generated(tokenizer, mask_token_id),
            report=RowReport(repr(config.dataset), config.skip_bad_rows),
        )
        for part in parts
    ]


def pretrain(
    config: TrainConfig,
    train_part: Sequence[Example],
    validation: Sequence[Example],
    folder: Path,
    resume_from_checkpoint: str,
    log: Log | None,
) -> None:
    """Stage 0, on one process: a small backbone, or the given one further, unless it is there."""
    finished = folder / PRETRAINED
    if resume_from_checkpoint != "latest":
        finished.unlink(missing_ok=True)
    elif finished.exists() and not Checkpoints(folder).steps():
        tqdm.write("The pretraining is complete; of what data is not known without checkpoints.")
        return
    options = {
        "resume_from_checkpoint": resume_from_checkpoint,
        "checkpoints_total_limit": config.checkpoints_total_limit,
    }
    if config.backbone is None:
        model, tokenizer = _small_backbone(config, train_part)
        fit, settings = pretrain_backbone, config.pretraining
        mask_token_id = tokenizer.mask_token_id
    else:
        start, tokenizer = load_start(config.backbone)
        model, fit, settings = start.backbone, finetune_backbone, _further(config.pretraining)
        mask_token_id = known_mask_token_id(config, start, tokenizer)
        options["mask_token_id"] = mask_token_id
    parts = tokenize_parts(config, tokenizer, train_part, validation, mask_token_id=mask_token_id)
    if config.dataset == TASKS:
        parts[0] = TaskStream(tokenizer, config.dataset_config, config.max_length)
    history = fit(model, tokenizer, *parts, folder, settings, log, **options)
    with atomic_write(finished) as new:
        new.write_text(json.dumps(history, indent=2))


def _further(config: PretrainingConfig) -> PretrainingConfig:
    """The settings for a given backbone: those of a new one's training would spoil it."""
    new, given = asdict(PretrainingConfig()), asdict(finetuning_config(lora=False))
    chosen = {name: value for name, value in asdict(config).items() if value != new[name]}
    return PretrainingConfig(**(given | chosen))


def _small_backbone(
    config: TrainConfig, train_part: Sequence[Example]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    texts = [message["content"] for e in train_part for message in e.messages]
    texts += [e.answer for e in train_part]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    backbone_config = small_backbone_config(tokenizer, config.hidden_size, config.num_layers)
    backbone_config.is_causal = False
    torch.manual_seed(config.pretraining.seed)
    # The eager path's backward pass is the faster one in bf16 on CPUs.
    attention = "eager" if not torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_config(backbone_config, attn_implementation=attention)
    return model, tokenizer


def fit_stage_one(
    config: TrainConfig,
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train_part: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    mask_token_id: int,
    resume_from_checkpoint: str,
    log: Log | None,
) -> CoDDHead:
    """Stages 1 and 2: a head from EM on the answers' windows, marginally corrected."""
    embeddings = model.get_output_embeddings().weight.detach().float()
    windows = text_windows(train_part, config.window_length, tokenizer.eos_token_id)
    potentials, history = fit_generative(
        windows,
        text_windows(validation, config.window_length, tokenizer.eos_token_id),
        embeddings,
        config.num_latents,
        config.generative,
        config.output_dir,
        log,
        resume_from_checkpoint=resume_from_checkpoint,
        checkpoints_total_limit=config.checkpoints_total_limit,
    )
    if PartialState().is_main_process:
        path = Path(config.output_dir, "generative_history.json")
        path.write_text(json.dumps(history, indent=2))
    marginal = token_marginal(potentials, config.window_length)
    # A token that the circuit has never seen gets the ratio 1: it says nothing about it.
    unseen = windows.flatten().bincount(minlength=len(embeddings)) == 0
    emission = torch.where(unseen, marginal.log(), potentials.emission.dense())
    forbidden = never_generated(tokenizer, mask_token_id)
    beyond = range(len(tokenizer), model.config.vocab_size)
    head_config = CoDDHeadConfig(
        vocab_size=model.config.vocab_size,
        num_latents=config.num_latents,
        window_length=config.window_length,
        mask_token_id=mask_token_id,
        forbidden_token_ids=sorted({*forbidden, *beyond} - {mask_token_id}),
        base_model_name_or_path=None if config.trains_backbone else model.backbone.name_or_path,
    )
    head = CoDDHead(head_config)
    fitted = Potentials(potentials.initial, potentials.transition, emission)
    head.set_potentials(fitted, marginal, alpha=config.alpha)
    return head


@torch.no_grad()
def check_head_settings(config: TrainConfig) -> None:
    """Finds settings of a head that cannot be before anything is trained.

    Raises:
        ValueError: one is out of range.
    """
    CoDDHeadConfig(
        vocab_size=config.num_latents,
        num_latents=config.num_latents,
        window_length=config.window_length,
        alpha=config.alpha,
        context_size=1,
        **_conditional_settings(config),
    )


def _conditional_settings(config: TrainConfig) -> dict[str, Any]:
    """Of the head of the conditional fit, beside those that it has from the generative fit."""
    return {
        "emission": config.emission,
        "emission_rank": config.emission_rank,
        "conditioning": config.conditioning,
        "noise_conditioning": config.noise_conditioning,
    }


def start_of_stage_three(config: TrainConfig, model: CoDDModel, stage_one: CoDDHead) -> CoDDHead:
    """The head that the conditional fit begins with: stage 1's, flattened, with conditioning.

    Tied emissions start as the least-squares fit of stage 1's dense ones.
    """
    changes = _conditional_settings(config) | {"context_size": model.config.hidden_size}
    torch.manual_seed(config.conditional.seed)  # of the maps that start at random
    head = CoDDHead(CoDDHeadConfig.from_dict(stage_one.config.to_dict() | changes))
    if config.emission == "tied":
        head.bind(model.get_output_embeddings().weight)
    fitted = stage_one.potentials.scaled_by_marginal(stage_one.token_marginal.log(), config.alpha)
    head.set_potentials(fitted, stage_one.token_marginal, alpha=config.alpha)
    head.temper(config.emission_power, config.transition_power)
    if head.context_maps is not None:
        law = fitted.emission.dense().log_softmax(-1).mean(0)
        head.context_maps.start(law, occupancy(fitted, config.window_length).mean(0))
    return head
