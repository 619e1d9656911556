"""Stage 3: fit the head to the backbone's own predictions (CoDD, arXiv 2603.00045, Eq. 7).

The backbone is frozen. Only `log p_w(x) - log Z` depends on the circuit; its gradient is counts
under the data minus counts under the coupled model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..modeling_codd import CoDDModel
from .checkpoint import load_checkpoint, optimizer_tensors, restore_optimizers, save_checkpoint
from .data import CanvasBatch, TokenizedExample, batch_indices, collate
from .noise import Noise, sample_noise
from .settings import ConditionalConfig

logger = logging.getLogger(__name__)


def draw_windows(
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    window_length: int,
    max_extra_windows: int,
    generator: torch.Generator,
) -> tuple[CanvasBatch, Noise, torch.Tensor]:
    """Canvases with one noised window a row, earlier ones visible and later ones masked.

    Returns:
        canvases, noise, and `[batch]` the start of each row's window.
    """
    extra = torch.randint(max_extra_windows + 1, (len(examples),), generator=generator)
    canvas = collate(
        examples,
        window_length=window_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        extra_windows=extra.tolist(),
    )
    noise = sample_noise(
        canvas, window_length=window_length, generator=generator, window_probability=1.0
    )
    return canvas, noise, noise.span.long().argmax(1)


def window_gains(
    model: CoDDModel,
    canvas: CanvasBatch,
    noise: Noise,
    starts: torch.Tensor,
    evidence_temperature: float = 1.0,
    autocast=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log p_w(x) - log Z` `[batch]` of the noised windows, and their masked tokens `[batch]`."""
    device = canvas.input_ids.device
    input_ids = canvas.input_ids.masked_fill(noise.masked.to(device), model.config.mask_token_id)
    with autocast or torch.autocast(device.type, enabled=False):
        states = model.backbone_states(input_ids, canvas.attention_mask)
        distribution = model.window_distribution(
            states,
            input_ids,
            starts.to(device),
            canvas.attention_mask,
            temperature=evidence_temperature,
        )
    positions = starts.to(device)[:, None] + torch.arange(model.window_length, device=device)
    truth = canvas.input_ids.gather(1, positions.clamp(max=canvas.input_ids.shape[1] - 1))
    return distribution.coupling_gain(truth), distribution.masked.sum(1)


def fit_conditional(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    checkpoint_dir: str | Path | None = None,
    config: ConditionalConfig | None = None,
) -> list[dict[str, float]]:
    """Trains `model.coupling_head` in place; the backbone is frozen (and stays so).

    Args:
        model: a backbone with a head, best from stages 1 and 2.
        tokenizer: its tokenizer.
        train: what the head learns from.
        validation: what it is measured on, with fixed noise.
        checkpoint_dir: a run that stopped is continued from `checkpoint_dir/conditional`.
        config: how to fit.

    Returns:
        The validation history: `step`, `gain` (nats per masked token over factorized), `seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: the model has no head.
    """
    config = config or ConditionalConfig()
    if model.coupling_head is None:
        raise ValueError("`model` has no head to fit: give `from_backbone` a head configuration.")
    accelerator = Accelerator()
    device = accelerator.device
    # Not the accelerator's own, which is one for the whole process: each stage has its precision.
    autocast = torch.autocast(device.type, torch.bfloat16, config.mixed_precision == "bf16")
    model.to(device).eval()
    head = model.coupling_head
    model.requires_grad_(False)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    length = model.window_length
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // length) * length for e in train]
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / "conditional"
    step, history, seconds = 0, [], 0.0
    found = None if path is None else load_checkpoint(path)
    if found is not None:
        tensors, state = found
        restored = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        head.load_state_dict(restored, strict=False)
        restore_optimizers([optimizer], tensors)
        step, history, seconds = state["step"], state["history"], state["seconds"]
        logger.info("Continuing from step %d.", step)
    else:
        history.append({"step": 0, **evaluate_head(model, tokenizer, validation, config)})
        tqdm.write(str(history[-1]))

    batches = batch_indices(lengths, config.tokens_per_batch, config.seed, first_batch=step)
    progress = tqdm(total=config.max_steps, initial=step, desc="conditional fit", unit="step")
    started, running = time.monotonic(), None
    while step < config.max_steps:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        examples = [train[i] for i in next(batches)]
        canvas, noise, starts = draw_windows(
            examples, tokenizer, length, config.max_extra_windows, generator
        )
        canvas = canvas.to(device)
        optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule(step, config)
        gains, masked = window_gains(
            model, canvas, noise, starts, config.evidence_temperature, autocast
        )
        if config.loss == "elbo":
            loss = -(gains / noise.level.to(gains.device)).sum() / (length * len(gains))
        else:
            loss = -gains.sum() / masked.sum().clamp(min=1)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step}: lower `learning_rate` (now "
                f"{config.learning_rate})."
            )
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        gain = (gains.sum() / masked.sum().clamp(min=1)).item()
        running = gain if running is None else 0.95 * running + 0.05 * gain
        progress.update()
        progress.set_postfix(gain=f"{running:+.3f} nats/token")
        last = step == config.max_steps
        if last or step % config.evaluation_steps == 0:
            measured = evaluate_head(model, tokenizer, validation, config)
            elapsed = seconds + time.monotonic() - started
            history.append({"step": step, **measured, "seconds": elapsed})
            tqdm.write(str(history[-1]))
        if path is not None and (last or step % config.checkpointing_steps == 0):
            now = time.monotonic()
            seconds, started = seconds + now - started, now
            tensors = {f"head.{k}": v for k, v in head.named_parameters()}
            state = {"step": step, "history": history, "seconds": seconds}
            state["config"] = asdict(config)
            save_checkpoint(path, tensors | optimizer_tensors([optimizer]), state)
    progress.close()
    return history


@torch.no_grad()
def evaluate_head(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: ConditionalConfig,
) -> dict[str, float]:
    """Mean gain in nats per masked token, all and by mask ratio, on fixed draws of noise."""
    generator = torch.Generator().manual_seed(1234)
    examples = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
    gains, masked, levels = [], [], []
    for first in range(0, len(examples), 32):
        canvas, noise, starts = draw_windows(
            examples[first : first + 32], tokenizer, model.window_length, 1, generator
        )
        gain, count = window_gains(
            model, canvas.to(model.device), noise, starts, config.evidence_temperature
        )
        gains.append(gain.cpu())
        masked.append(count.cpu())
        levels.append(noise.level)
    gain, count, level = torch.cat(gains), torch.cat(masked), torch.cat(levels)
    result = {"gain": (gain.sum() / count.sum()).item()}
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
        rows = (level >= low) & (level < high)
        total = count[rows].sum().clamp(min=1)
        result[f"gain_{low:.2f}-{min(high, 1):.2f}"] = (gain[rows].sum() / total).item()
    return result


def _schedule(step: int, config: ConditionalConfig) -> float:
    """Warm-up, then a cosine to zero."""
    progress = torch.tensor(step / config.max_steps * torch.pi)
    return min((step + 1) / config.warmup_steps, 1.0) * (0.5 + 0.5 * progress.cos().item())
