"""Stage 3: fit the head to the backbone's own predictions (CoDD, arXiv 2603.00045, Eq. 7).

The backbone is frozen: it runs over the data first, and what it says is kept (`window_cache`).
After that it is not needed. Only `log p_w(x) - log Z` depends on the circuit; its gradient is
counts under the data minus counts under the coupled model.

Several processes share the chunks of a step's windows; gradients of chunks are summed in float64,
so that a step does not depend on who computed what. (Plain averaging would: AdamW's step has no
regard for the size of a gradient, and makes as much of a rounding error where there is no other.)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from .checkpoint import (
    check_same_run,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizers,
    save_checkpoint,
)
from .counting import summing_dtype
from .data import TokenizedExample
from .noised_windows import NoisedWindows
from .settings import ConditionalConfig
from .window_cache import WindowCache, cache_windows

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "max_steps",
    "evaluation_steps",
    "checkpointing_steps",
    "evidence_dir",
    "num_validation_draws",
)
"""Settings that a run may be continued with other values of."""

Log = Callable[[int, dict[str, float]], None]
"""Told of every step: its number, from 1, and its `loss` and `gain`."""


def fit_conditional(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    checkpoint_dir: str | Path | None = None,
    config: ConditionalConfig | None = None,
    log: Log | None = None,
) -> list[dict[str, float]]:
    """Trains `model.coupling_head` in place; the backbone is frozen (and stays so).

    The backbone runs over the data first; its evidence is kept in `config.evidence_dir`, by default
    `checkpoint_dir/evidence`, and in memory if there is neither.

    Args:
        model: a backbone with a head, best from stages 1 and 2.
        tokenizer: its tokenizer.
        train: what the head learns from.
        validation: what it is measured on, with fixed noise.
        checkpoint_dir: a run that stopped is continued from `checkpoint_dir/conditional`.
        config: how to fit.
        log: told of every step.

    Returns:
        As `fit_head`.

    Raises:
        FloatingPointError: the loss is no longer finite.
        OSError: the disk has no room.
        ValueError: the model has no head, or there is evidence or a checkpoint that something else
            made.
    """
    config = config or ConditionalConfig()
    if model.coupling_head is None:
        raise ValueError("`model` has no head to fit: give `from_backbone` a head configuration.")
    model.to(Accelerator().device).eval()
    model.requires_grad_(False)
    folder = config.evidence_dir
    if folder is None and checkpoint_dir is not None:
        folder = Path(checkpoint_dir) / "evidence"
    caches = [
        cache_windows(
            model,
            tokenizer,
            examples,
            config.evidence(draws, seed),
            None if folder is None else Path(folder) / name,
        )
        for name, examples, draws, seed in (
            ("train", train, config.num_draws, config.seed),
            ("validation", validation, config.num_validation_draws, 1234),
        )
    ]
    return fit_head(model.coupling_head, *caches, checkpoint_dir, config, log)


def fit_head(
    head: CoDDHead,
    train: WindowCache,
    validation: WindowCache,
    checkpoint_dir: str | Path | None = None,
    config: ConditionalConfig | None = None,
    log: Log | None = None,
) -> list[dict[str, float]]:
    """Trains a head in place on evidence alone; no backbone is there.

    Args:
        head: the head, bound to an output embedding if its emissions are tied.
        train: evidence that it learns from.
        validation: evidence that it is measured on.
        checkpoint_dir: a run that stopped is continued from `checkpoint_dir/conditional`.
        config: how to fit.
        log: told of every step.

    Returns:
        The validation history: `step`, `gain` (nats per masked token over factorized, all and by
        mask ratio), `loss` (the mean since the last entry) and `seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite; the message names the windows.
        OSError: the disk has no room for a checkpoint.
        ValueError: the checkpoint is another run's, or damaged.
    """
    config = config or ConditionalConfig()
    accelerator = Accelerator()
    head.to(accelerator.device)
    head.requires_grad_(True)
    context = [] if head.context_maps is None else list(head.context_maps.parameters())
    circuit = [p for n, p in head.named_parameters() if not n.startswith("context_maps.")]
    groups = [{"params": circuit, "peak": config.learning_rate}]
    if context:
        groups.append({"params": context, "peak": config.context_learning_rate})
    # Gradients of a low-rank term that is still a no-op are tiny: hence the tiny `eps`.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-15, weight_decay=0.0)
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / "conditional"
    made_of = asdict(config) | {"num_windows": len(train)}
    step, history, seconds, losses = 0, [], 0.0, 0.0
    found = None if path is None else load_checkpoint(path)
    if found is not None:
        tensors, state = found
        check_same_run(path, state["config"], made_of, MAY_CHANGE)
        restored = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        head.load_state_dict(restored, strict=False)
        restore_optimizers([optimizer], tensors)
        step, history, seconds = state["step"], state["history"], state["seconds"]
        losses = state["losses"]
        logger.info("Continuing from step %d.", step)
    show = tqdm.write if accelerator.is_main_process else logger.debug
    if found is None:
        history.append({"step": 0, **evaluate_head(head, validation)})
        show(str(history[-1]))

    progress = tqdm(
        total=config.max_steps,
        initial=step,
        desc="conditional fit",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    started, running = time.monotonic(), None
    while step < config.max_steps:
        rows = _rows_of_step(len(train), step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, config)
        loss, gain = _step_gradients(head, train, rows, config, accelerator)
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad, reason = _not_finite(head, train, rows)
            raise FloatingPointError(
                f"The loss is {loss} and its gradient's norm {norm} at step {step}, from the "
                f"windows {bad[:8] or rows.tolist()} of the evidence: lower `learning_rate` (now "
                f"{config.learning_rate}).{reason}"
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses += loss
        running = gain if running is None else 0.95 * running + 0.05 * gain
        progress.update()
        progress.set_postfix(gain=f"{running:+.3f} nats/token")
        if log is not None:
            log(step, {"loss": loss, "gain": gain})
        last = step == config.max_steps
        if last or step % config.evaluation_steps == 0:
            measured = evaluate_head(head, validation)
            elapsed = seconds + time.monotonic() - started
            mean = losses / (step - history[-1]["step"])
            history.append({"step": step, **measured, "loss": mean, "seconds": elapsed})
            losses = 0.0
            show(str(history[-1]))
        if path is not None and (last or step % config.checkpointing_steps == 0):
            now = time.monotonic()
            seconds, started = seconds + now - started, now
            if accelerator.is_main_process:
                tensors = {f"head.{k}": v for k, v in head.named_parameters()}
                state = {"step": step, "history": history, "seconds": seconds, "losses": losses}
                state["config"] = made_of
                save_checkpoint(path, tensors | optimizer_tensors([optimizer]), state)
            accelerator.wait_for_everyone()
    progress.close()
    return history


def window_gains(
    head: CoDDHead, cache: WindowCache, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log p_w(x) - log Z` `[B]` of some windows, and their numbers of masked tokens `[B]`."""
    return _gains(head, cache.take(rows), cache.temperature)


def _gains(
    head: CoDDHead, windows: NoisedWindows, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = windows.distribution(head, temperature)
    truth = windows.tokens.long().to(head.device)
    return distribution.coupling_gain(truth), distribution.masked.sum(1)


@torch.no_grad()
def evaluate_head(head: CoDDHead, cache: WindowCache, batch_size: int = 64) -> dict[str, float]:
    """Mean gain in nats per masked token over factorized, all and by mask ratio.

    Several processes share the windows, and all get the result.
    """
    accelerator = Accelerator()
    processes, gains, masked = accelerator.num_processes, [], []
    rows = torch.arange(-(-len(cache) // processes) * processes) % len(cache)  # equal parts
    for batch in rows.split(batch_size * processes):
        own = batch[accelerator.process_index :: processes]
        for kept, part in zip((gains, masked), window_gains(head, cache, own), strict=True):
            whole = accelerator.gather(part).view(processes, -1).T.flatten()
            kept.append(whole.cpu())
    gain, count = (torch.cat(kept)[: len(cache)] for kept in (gains, masked))
    level = cache.level
    result = {"gain": (gain.sum() / count.sum()).item()}
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
        rows = (level >= low) & (level < high)
        total = count[rows].sum().clamp(min=1)
        result[f"gain_{low:.2f}-{min(high, 1):.2f}"] = (gain[rows].sum() / total).item()
    return result


def _step_gradients(
    head: CoDDHead,
    cache: WindowCache,
    rows: torch.Tensor,
    config: ConditionalConfig,
    accelerator: Accelerator,
) -> tuple[float, float]:
    """Sets the gradients of the mean loss of a step's windows `rows [B]`.

    Returns:
        The loss, and the gain in nats per masked token.
    """
    parameters = list(head.parameters())
    device = head.device
    kind = {"device": device, "dtype": summing_dtype(device)}
    sums = torch.zeros(sum(p.numel() for p in parameters), **kind)
    totals = torch.zeros(3, **kind)  # loss, gain, masked tokens
    chunks = rows.split(config.windows_per_chunk)
    for chunk in chunks[accelerator.process_index :: accelerator.num_processes]:
        windows = cache.take(chunk.sort().values)  # shards are read in order
        try:
            gains, masked = _gains(head, windows, cache.temperature)
        except ValueError:
            totals += torch.nan  # all processes must learn of it, not this one alone
            continue
        weighted = gains / windows.level.to(device) if config.loss == "elbo" else gains
        loss = -weighted.sum()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        sums += torch.cat([gradient.flatten() for gradient in gradients])
        totals += torch.stack((loss.detach(), gains.detach().sum(), masked.sum()))
    sums, totals = accelerator.reduce(sums, "sum"), accelerator.reduce(totals, "sum")
    loss, gain, masked = totals.tolist()
    masked = max(masked, 1)
    norm = masked if config.loss == "token" else head.config.window_length * len(rows)
    parts = sums.div_(norm).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return loss / norm, gain / masked


@torch.no_grad()
def _not_finite(head: CoDDHead, cache: WindowCache, rows: torch.Tensor) -> tuple[list[int], str]:
    """Which windows have no finite gain, and what the distribution said of the last one."""
    bad, reason = [], ""
    for row in rows:
        try:
            finite = bool(window_gains(head, cache, row[None])[0].isfinite())
        except ValueError as error:
            finite, reason = False, f" {error}"
        if not finite:
            bad.append(int(row))
    return bad, reason


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
