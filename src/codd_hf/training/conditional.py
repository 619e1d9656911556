"""Stage 3: fit the head to the backbone's own predictions (CoDD, arXiv 2603.00045, Eq. 7).

The backbone is frozen: it runs over the data first, and what it says is kept (`window_cache`).
Only `log p_w(x) - log Z` depends on the circuit; its gradient is counts under the data minus counts
under the coupled model.
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
from ..modeling_head import CoDDHead
from .checkpoint import load_checkpoint, optimizer_tensors, restore_optimizers, save_checkpoint
from .data import TokenizedExample
from .settings import ConditionalConfig
from .window_cache import WindowCache, cache_windows

logger = logging.getLogger(__name__)


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
    model.to(accelerator.device).eval()
    head = model.coupling_head
    model.requires_grad_(False)
    head.requires_grad_(True)
    context = [] if head.context_maps is None else list(head.context_maps.parameters())
    circuit = [p for n, p in head.named_parameters() if not n.startswith("context_maps.")]
    groups = [{"params": circuit, "peak": config.learning_rate}]
    if context:
        groups.append({"params": context, "peak": config.context_learning_rate})
    # Gradients of a low-rank term that is still a no-op are tiny: hence the tiny `eps`.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-15, weight_decay=0.0)
    caches = [
        cache_windows(
            model,
            tokenizer,
            examples,
            num_draws=draws,
            max_extra_windows=config.max_extra_windows,
            top_k=config.cached_top_k,
            temperature=config.evidence_temperature,
            tokens_per_batch=config.tokens_per_batch,
            mixed_precision=config.mixed_precision,
            seed=seed,
        )
        for examples, draws, seed in (
            (train, config.num_draws, config.seed),
            (validation, config.num_validation_draws, 1234),
        )
    ]
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
        history.append({"step": 0, **evaluate_head(head, caches[1])})
        tqdm.write(str(history[-1]))

    progress = tqdm(total=config.max_steps, initial=step, desc="conditional fit", unit="step")
    started, running = time.monotonic(), None
    while step < config.max_steps:
        rows = _rows_of_step(len(caches[0]), step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, config)
        gains, masked = window_gains(head, caches[0], rows)
        if config.loss == "elbo":
            level = caches[0].level[rows].to(gains.device)
            loss = -(gains / level).sum() / (head.config.window_length * len(gains))
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
            measured = evaluate_head(head, caches[1])
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


def window_gains(
    head: CoDDHead, cache: WindowCache, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log p_w(x) - log Z` `[B]` of some windows, and their numbers of masked tokens `[B]`."""
    distribution = cache.distribution(head, rows)
    truth = cache.tokens[rows].long().to(head.device)
    return distribution.coupling_gain(truth), distribution.masked.sum(1)


@torch.no_grad()
def evaluate_head(head: CoDDHead, cache: WindowCache, batch_size: int = 64) -> dict[str, float]:
    """Mean gain in nats per masked token over factorized, all and by mask ratio."""
    gains, masked = [], []
    for rows in torch.arange(len(cache)).split(batch_size):
        gain, count = window_gains(head, cache, rows)
        gains.append(gain.cpu())
        masked.append(count.cpu())
    gain, count, level = torch.cat(gains), torch.cat(masked), cache.level
    result = {"gain": (gain.sum() / count.sum()).item()}
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
        rows = (level >= low) & (level < high)
        total = count[rows].sum().clamp(min=1)
        result[f"gain_{low:.2f}-{min(high, 1):.2f}"] = (gain[rows].sum() / total).item()
    return result


def _rows_of_step(number: int, step: int, config: ConditionalConfig) -> torch.Tensor:
    """The windows of a step, a pure function of it: every epoch is a new permutation."""
    size = min(config.windows_per_batch, number)
    epoch, batch = divmod(step, number // size)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    return torch.randperm(number, generator=generator)[batch * size : (batch + 1) * size]


def _schedule(step: int, config: ConditionalConfig) -> float:
    """Warm-up, then a cosine to zero."""
    progress = torch.tensor(step / config.max_steps * torch.pi)
    return min((step + 1) / config.warmup_steps, 1.0) * (0.5 + 0.5 * progress.cos().item())
