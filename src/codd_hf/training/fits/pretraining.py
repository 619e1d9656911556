"""Masked-diffusion training of a backbone: a new one, or a given one further.

The loss is the diffusion ELBO: the cross-entropy of masked tokens, weighted by `1/t`, over the
number of tokens that could have been masked (LLaDA, arXiv 2502.09992, Eq. 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...backbones import family_of, load_backbone
from ...coupling.adapter_files import write_adapter
from ...data.canvases import CanvasBatch, TokenizedExample, batch_indices, collate, padding_token_id
from ...data.fingerprint import (
    data_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from ...data.noise import Noise, sample_noise
from ...runtime.precision import autocast, chosen_precision, precision_note
from ..loop.checkpoints import Checkpoints
from ..loop.steps import StepLoop
from ..loop.trackers import Log
from ..settings import PretrainingConfig
from ..task_stream import TaskStream
from .lora import add_lora, trained_in_float32
from .muon import muon

MAY_CHANGE = ("max_steps", "evaluation_steps", "checkpointing_steps")
"""Settings that a run may be continued with other values of."""


def small_backbone_config(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 256,
    num_layers: int = 4,
    max_position_embeddings: int = 2048,
) -> LlamaConfig:
    """A bidirectional Llama of a few million parameters (the embedded default's shape).

    Raises:
        ValueError: a head of attention would not have an even number of features.
    """
    num_heads = max(hidden_size // 64, 1)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"`hidden_size` must give each of {num_heads} attention heads an even number of "
            f"features, got {hidden_size}: take a multiple of 64."
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def diffusion_loss(
    model: PreTrainedModel, canvas: CanvasBatch, noise: Noise, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ELBO-weighted loss of a batch (a scalar) and the unweighted loss of its targets `[n]`."""
    truth, device = canvas.input_ids, canvas.input_ids.device
    input_ids = truth.masked_fill(noise.masked.to(device), mask_token_id)
    states = family_of(model.config).states(model, input_ids, canvas.attention_mask)
    rows, columns = noise.target.to(device).nonzero(as_tuple=True)
    losses = F.cross_entropy(
        states.logits((rows, columns)).float(), truth[rows, columns], reduction="none"
    )
    weighted = losses / noise.level.to(device)[rows]
    return weighted.sum() / noise.span.sum().clamp(min=1), losses


def pretrain_backbone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample] | TaskStream,
    validation: Sequence[TokenizedExample],
    output_dir: str | Path,
    config: PretrainingConfig | None = None,
    log: Log | None = None,
    *,
    resume_from_checkpoint: str | Path = "latest",
    checkpoints_total_limit: int | None = 2,
) -> list[dict[str, float]]:
    """Trains a new `model` in place and writes it to `output_dir`.

    Args:
        model: a backbone whose family is known.
        tokenizer: its tokenizer, with mask, padding and end-of-text tokens.
        train: what it learns from, or a stream of it without end.
        validation: what it is measured on, with fixed noise.
        output_dir: receives the checkpoints, the model and the tokenizer.
        config: how to train.
        log: told of every step.
        resume_from_checkpoint: `"latest"` goes on from the newest checkpoint there, if there is
            one; `"none"` deletes them and begins; a checkpoint's folder goes on from that, and
            deletes later ones.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones; all if None.

    Returns:
        The validation history: `step`, `elbo` (nats per token, an upper bound), `nats` (nats per
        masked token of window noise), `tokens`, `seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite.
        OSError: the disk has no room for a checkpoint.
        ValueError: the checkpoint is another run's, or damaged.
    """
    config = config or PretrainingConfig()
    noise = _Noise(config, tokenizer, tokenizer.mask_token_id)
    optimizers = _make_optimizers(model, config)
    checkpoints = Checkpoints(output_dir, checkpoints_total_limit)
    history = _train(
        model, optimizers, noise, train, validation, checkpoints, resume_from_checkpoint, log, {}
    )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return history


def finetuning_config(lora: bool) -> PretrainingConfig:
    """How a given backbone is trained further: with lower rates and for fewer steps."""
    return PretrainingConfig(
        max_steps=1000, learning_rate=2e-4 if lora else 5e-5, weight_decay=0.0, warmup_steps=50
    )


def finetune_backbone(
    backbone: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample] | TaskStream,
    validation: Sequence[TokenizedExample],
    output_dir: str | Path,
    config: PretrainingConfig | None = None,
    log: Log | None = None,
    *,
    lora: LoraConfig | None = None,
    mask_token_id: int | None = None,
    resume_from_checkpoint: str | Path = "latest",
    checkpoints_total_limit: int | None = 2,
) -> list[dict[str, float]]:
    """Trains a given backbone further, with AdamW, and writes the result to `output_dir`.

    That is the whole backbone or, with `lora`, the adapter alone, for
    `CoDDModel.from_backbone(backbone, head, adapter=output_dir)`.

    Args:
        backbone: a model, which is trained in place, or the folder or id of one; an autoregressive
            decoder becomes a bidirectional one by it.
        tokenizer: its tokenizer, with padding and end-of-text tokens.
        train: what it learns from, or a stream of it without end.
        validation: what it is measured on, with fixed noise.
        output_dir: receives the checkpoints, the result and the tokenizer. A run that goes on is
            given the backbone as it was before the first step.
        config: how to train; default, `finetuning_config`.
        log: told of every step.
        lora: PEFT's options of a new adapter that is trained in place of the backbone.
        mask_token_id: the mask token; default, the backbone's or the tokenizer's.
        resume_from_checkpoint: as in `pretrain_backbone`.
        checkpoints_total_limit: how many checkpoints are kept.

    Returns:
        As `pretrain_backbone`.

    Raises:
        FloatingPointError: the loss is no longer finite.
        OSError: there is no such backbone, or the disk has no room for a checkpoint.
        ValueError: the mask token is not known, the backbone's family is not, or the checkpoint is
            another run's, or damaged.
    """
    config = config or finetuning_config(lora is not None)
    if isinstance(backbone, str | Path):
        backbone = load_backbone(str(backbone))
    family_of(backbone.config).make_bidirectional(backbone.config)
    for known in (getattr(backbone.config, "mask_token_id", None), tokenizer.mask_token_id):
        mask_token_id = known if mask_token_id is None else mask_token_id
    if mask_token_id is None:
        raise ValueError("`mask_token_id` must be given: neither backbone nor tokenizer has one.")
    made_of = {"model_weights": weights_fingerprint(backbone)}
    if lora is not None:
        add_lora(backbone, lora, "default", config.seed)
    noise = _Noise(config, tokenizer, mask_token_id)
    trained = trained_in_float32(backbone)
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    checkpoints = Checkpoints(output_dir, checkpoints_total_limit)
    run = (train, validation, checkpoints, resume_from_checkpoint, log, made_of)
    history = _train(backbone, [optimizer], noise, *run)
    if lora is None:
        backbone.save_pretrained(output_dir)
    else:
        write_adapter(backbone, "default", output_dir, backbone.name_or_path or None)
    tokenizer.save_pretrained(output_dir)
    return history


@dataclass
class _Noise:
    """Draws noised canvases of examples."""

    config: PretrainingConfig
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int

    def draw(
        self,
        examples: Sequence[TokenizedExample],
        generator: torch.Generator,
        **options: float,
    ) -> tuple[CanvasBatch, Noise]:
        config, tokenizer = self.config, self.tokenizer
        extra = torch.randint(config.max_extra_windows + 1, (len(examples),), generator=generator)
        canvas = collate(
            examples,
            window_length=config.window_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding_token_id(tokenizer),
            extra_windows=extra.tolist(),
        )
        options = {"window_probability": config.window_probability} | options
        noise = sample_noise(
            canvas,
            window_length=config.window_length,
            generator=generator,
            mean_span_length=config.mean_span_length,
            **options,
        )
        return canvas, noise


def _train(
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    noise: _Noise,
    train: Sequence[TokenizedExample] | TaskStream,
    validation: Sequence[TokenizedExample],
    checkpoints: Checkpoints,
    resume_from_checkpoint: str | Path,
    log: Log | None,
    made_of: dict[str, Any],
) -> list[dict[str, float]]:
    """The steps; the model is on its device and in evaluation mode at the end."""
    config = noise.config
    accelerator = Accelerator()
    device = accelerator.device
    precision = chosen_precision(config.mixed_precision, device)
    # Not the accelerator's own, which is one for the whole process: each stage has its precision.
    computing = autocast(precision, device)
    model.to(device).train()
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    made_of = {
        **asdict(config),
        "mixed_precision": precision,
        "mask_token_id": noise.mask_token_id,
        "num_trained": sum(p.numel() for p in trained.values()),
        "data": data_fingerprint(train.beginning() if isinstance(train, TaskStream) else train),
        "validation_data": data_fingerprint(validation),
        "model_settings": settings_fingerprint(model.config),
        **tokenizer_fingerprint(noise.tokenizer),
        **made_of,
    }
    loop = StepLoop(
        "pretraining",
        config,
        made_of,
        trained,
        optimizers,
        checkpoints,
        log,
        tally="tokens",
        alone=True,
    )
    # A run that leaves the choice to the device may go on with another one.
    auto = ("mixed_precision",) if config.mixed_precision == "auto" else ()
    if loop.resume(resume_from_checkpoint, (*MAY_CHANGE, *auto)):
        steps = config.max_steps
        going_on = f"goes on from step {loop.step} of {steps}"
        loop.show(f"The pretraining {going_on if loop.step < steps else 'is complete'}.")
    if loop.step < config.max_steps:
        loop.show(precision_note(precision, device))
    batches = _batches(train, config, loop.step)

    def backward(step: int) -> tuple[dict[str, float], int, dict[str, str]]:
        seed = config.seed * 1_000_003 + step
        canvas, drawn = noise.draw(next(batches), torch.Generator().manual_seed(seed))
        rate = config.learning_rate * _schedule(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with computing, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # of dropout
            loss, losses = diffusion_loss(model, canvas.to(device), drawn, noise.mask_token_id)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step}: lower `learning_rate` (now "
                f"{config.learning_rate}) or use `mixed_precision='no'`."
            )
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        nats = losses.mean().item()
        told = {"loss": loss.item(), "nats": nats, "learning_rate": rate}
        return told, int(canvas.attention_mask.sum()), {"nats": f"{nats:.3f}", "lr": f"{rate:.1e}"}

    history = loop.run(backward, lambda: _evaluate(model, validation, noise))
    model.eval()
    return history


def _batches(
    train: Sequence[TokenizedExample] | TaskStream, config: PretrainingConfig, first_batch: int
) -> Iterator[list[TokenizedExample]]:
    """Endless batches; a pure function of the arguments and a batch's number."""
    size, windows = config.tokens_per_batch, config.window_length
    if isinstance(train, TaskStream):
        yield from train.batches(size, windows, config.seed, first_batch)
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // windows) * windows for e in train]
    for indices in batch_indices(lengths, size, config.seed, first_batch):
        yield [train[i] for i in indices]


@torch.no_grad()
def _evaluate(
    model: PreTrainedModel, examples: Sequence[TokenizedExample], noise: _Noise
) -> dict[str, float]:
    """ELBO per token over whole answers, and nats per masked token under window noise."""
    model.eval()
    device = model.device
    examples = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
    result = {}
    for name, window_probability in (("elbo", 0.0), ("nats", 1.0)):
        generator = torch.Generator().manual_seed(1234)
        total, count = 0.0, 0
        for first in range(0, len(examples), 32):
            canvas, drawn = noise.draw(
                examples[first : first + 32],
                generator,
                window_probability=window_probability,
                prompt_probability=0.0,
            )
            with autocast(noise.config.mixed_precision, device):
                loss, losses = diffusion_loss(model, canvas.to(device), drawn, noise.mask_token_id)
            size = int(drawn.span.sum()) if name == "elbo" else len(losses)
            total += (loss if name == "elbo" else losses.mean()).item() * size
            count += size
        result[name] = total / count
        if not math.isfinite(result[name]):
            raise FloatingPointError(
                f"The validation's {name} is {result[name]}: lower `learning_rate` (now "
                f"{noise.config.learning_rate}) or `weight_decay` (now "
                f"{noise.config.weight_decay}), or use `mixed_precision='no'`."
            )
    model.train()
    return result


def _schedule(step: int, config: PretrainingConfig) -> float:
    """Warm-up, constant, linear decay to zero."""
    decay_steps = max(math.ceil(config.max_steps * config.decay_fraction), 1)
    return min(
        (step + 1) / max(config.warmup_steps, 1), (config.max_steps - step) / decay_steps, 1.0
    )


def _make_optimizers(model: PreTrainedModel, config: PretrainingConfig):
    embedding_ids = {
        id(p)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
        for p in layer.parameters()
    }
    matrices, embeddings, vectors = [], [], []
    for parameter in model.parameters():
        if id(parameter) in embedding_ids:
            embeddings.append(parameter)
        else:
            (matrices if parameter.ndim == 2 else vectors).append(parameter)
    groups = [
        {"params": embeddings, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [
        muon(matrices, Accelerator().device, config.learning_rate, config.weight_decay),
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98)),
    ]
