"""Masked-diffusion pretraining (or fine-tuning) of a backbone.

The loss is the diffusion ELBO: the cross-entropy of masked tokens, weighted by `1/t`, over the
number of tokens that could have been masked (LLaDA, arXiv 2502.09992, Eq. 3).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..backbones import family_of
from .checkpoint import load_checkpoint, optimizer_tensors, restore_optimizers, save_checkpoint
from .data import CanvasBatch, TokenizedExample, batch_indices, collate
from .noise import Noise, sample_noise
from .settings import PretrainingConfig

logger = logging.getLogger(__name__)


def small_backbone_config(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 256,
    num_layers: int = 4,
    max_position_embeddings: int = 2048,
) -> LlamaConfig:
    """A bidirectional Llama of a few million parameters (the embedded default's shape)."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=max(hidden_size // 64, 1),
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
    input_ids = canvas.input_ids.masked_fill(noise.masked, mask_token_id)
    states = family_of(model.config).states(model, input_ids, canvas.attention_mask)
    rows, columns = noise.target.nonzero(as_tuple=True)
    losses = F.cross_entropy(
        states.logits((rows, columns)).float(), canvas.input_ids[rows, columns], reduction="none"
    )
    return (losses / noise.level[rows]).sum() / noise.span.sum().clamp(min=1), losses


def pretrain_backbone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    output_dir: str | Path,
    config: PretrainingConfig | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place and writes it to `output_dir`.

    A run that stopped is continued from `output_dir/checkpoint`.

    Args:
        model: a backbone whose family is known.
        tokenizer: its tokenizer, with mask, padding and end-of-text tokens.
        train: what it learns from.
        validation: what it is measured on, with fixed noise.
        output_dir: receives the checkpoint, the model and the tokenizer.
        config: how to train.

    Returns:
        The validation history: `step`, `elbo` (nats per token, an upper bound), `nats` (nats per
        masked token of window noise), `tokens`, `seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    config = config or PretrainingConfig()
    output_dir = Path(output_dir)
    accelerator = Accelerator()
    device = accelerator.device
    # Not the accelerator's own, which is one for the whole process: each stage has its precision.
    autocast = torch.autocast(device.type, torch.bfloat16, config.mixed_precision == "bf16")
    model.to(device).train()
    optimizers = _make_optimizers(model, config)
    windows = config.window_length
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // windows) * windows for e in train]

    step, history, tokens, seconds = 0, [], 0, 0.0
    if (found := load_checkpoint(output_dir / "checkpoint")) is not None:
        tensors, state = found
        restored = {k.removeprefix("model."): v for k, v in tensors.items() if "model." in k[:6]}
        model.load_state_dict(restored, strict=False)
        restore_optimizers(optimizers, tensors)
        step, history = state["step"], state["history"]
        tokens, seconds = state["tokens"], state["seconds"]
        logger.info("Continuing from step %d.", step)

    def save() -> None:
        parameters = {f"model.{k}": v for k, v in model.named_parameters()}
        state = {"step": step, "history": history, "tokens": tokens, "seconds": seconds}
        state["config"] = asdict(config)
        tensors = parameters | optimizer_tensors(optimizers)
        save_checkpoint(output_dir / "checkpoint", tensors, state)

    batches = batch_indices(lengths, config.tokens_per_batch, config.seed, first_batch=step)
    progress = tqdm(total=config.max_steps, initial=step, desc="pretraining", unit="step")
    started = time.monotonic()
    while step < config.max_steps:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        canvas, noise = _draw([train[i] for i in next(batches)], tokenizer, config, generator)
        rate = config.learning_rate * _schedule(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with autocast:
            loss, losses = diffusion_loss(model, canvas.to(device), noise, tokenizer.mask_token_id)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step}: lower `learning_rate` (now "
                f"{config.learning_rate}) or use `mixed_precision='no'`."
            )
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        tokens += int(canvas.attention_mask.sum())
        progress.update()
        progress.set_postfix(nats=f"{losses.mean().item():.3f}", lr=f"{rate:.1e}")
        last = step == config.max_steps
        if last or step % config.evaluation_steps == 0:
            measured = evaluate_backbone(model, tokenizer, validation, config)
            elapsed = seconds + time.monotonic() - started
            history.append({"step": step, **measured, "tokens": tokens, "seconds": elapsed})
            tqdm.write(str(history[-1]))
        if last or step % config.checkpointing_steps == 0:
            now = time.monotonic()
            seconds, started = seconds + now - started, now
            save()
    progress.close()
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return history


@torch.no_grad()
def evaluate_backbone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: PretrainingConfig,
) -> dict[str, float]:
    """ELBO per token over whole answers, and nats per masked token under window noise."""
    was_training = model.training
    model.eval()
    examples = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
    result = {}
    for name, window_probability in (("elbo", 0.0), ("nats", 1.0)):
        generator = torch.Generator().manual_seed(1234)
        total, count = 0.0, 0
        for first in range(0, len(examples), 32):
            canvas, noise = _draw(
                examples[first : first + 32],
                tokenizer,
                config,
                generator,
                window_probability=window_probability,
                prompt_probability=0.0,
            )
            canvas = canvas.to(model.device)
            with torch.autocast(
                model.device.type, torch.bfloat16, config.mixed_precision == "bf16"
            ):
                loss, losses = diffusion_loss(model, canvas, noise, tokenizer.mask_token_id)
            size = int(noise.span.sum()) if name == "elbo" else len(losses)
            total += (loss if name == "elbo" else losses.mean()).item() * size
            count += size
        result[name] = total / count
    model.train(was_training)
    return result


def _draw(
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainingConfig,
    generator: torch.Generator,
    **noise_options: float,
) -> tuple[CanvasBatch, Noise]:
    extra = torch.randint(config.max_extra_windows + 1, (len(examples),), generator=generator)
    canvas = collate(
        examples,
        window_length=config.window_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        extra_windows=extra.tolist(),
    )
    noise_options.setdefault("window_probability", config.window_probability)
    noise = sample_noise(
        canvas, window_length=config.window_length, generator=generator, **noise_options
    )
    return canvas, noise


def _schedule(step: int, config: PretrainingConfig) -> float:
    """Warm-up, constant, linear decay to zero."""
    decay_steps = max(math.ceil(config.max_steps * config.decay_fraction), 1)
    return min((step + 1) / config.warmup_steps, (config.max_steps - step) / decay_steps, 1.0)


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
        torch.optim.Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98)),
    ]
