"""Stage 3: fit the head to the backbone's own predictions (CoDD, arXiv 2603.00045, Eq. 7).

The backbone is frozen: it runs over the data first, and what it says is kept (`window_cache`).
After that it is not needed. Only `log p_w(x) - log Z` depends on the circuit; its gradient is
counts under the data minus counts under the coupled model.

Several processes share the chunks of a step's windows; gradients of chunks are summed in float64,
so that a step does not depend on who computed what. (Plain averaging would: AdamW's step has no
regard for the size of a gradient, and makes as much of a rounding error where there is no other.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ...data.canvases import TokenizedExample
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ...runtime.precision import chosen_precision
from ..evidence.cache import WindowCache, cache_windows
from ..evidence.fingerprint import fit_identity, model_fingerprint
from ..loop.checkpoints import Checkpoints, load_checkpoint
from ..loop.steps import StepLoop
from ..loop.trackers import Log
from ..settings import ConditionalConfig
from .gains import evaluate_head, not_finite, step_gradients
from .rates import head_groups, warmup_then_cosine

MAY_CHANGE = (
    "max_steps",
    "evaluation_steps",
    "checkpointing_steps",
    "keep",
    "evidence_dir",
    "num_validation_draws",
)
"""Settings that a run may be continued with other values of."""

OF_THE_HEAD = (
    "num_latents",
    "window_length",
    "emission",
    "emission_rank",
    "conditioning",
    "noise_conditioning",
    "copy_length",
)
"""Settings of the head to fit, which a run is continued with."""


def fit_conditional(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    checkpoint_dir: str | Path | None = None,
    config: ConditionalConfig | None = None,
    log: Log | None = None,
    *,
    resume_from_checkpoint: str | Path = "latest",
    checkpoints_total_limit: int | None = 2,
) -> list[dict[str, float]]:
    """Trains `model.coupling_head` in place; the backbone is frozen (and stays so).

    The backbone runs over the data first; its evidence is kept in `config.evidence_dir`, by default
    `checkpoint_dir/evidence`, and in memory if there is neither. Where all steps were made already,
    it does not run, and the evidence may be gone.

    Args:
        model: a backbone with a head, best from stages 1 and 2.
        tokenizer: its tokenizer.
        train: what the head learns from.
        validation: what it is measured on, with fixed noise.
        checkpoint_dir: receives the checkpoints, in `checkpoint_dir/conditional`.
        config: how to fit.
        log: told of every step.
        resume_from_checkpoint: `"latest"` goes on from the newest checkpoint there, if there is
            one; `"none"` deletes them and begins; a checkpoint's folder goes on from that, and
            deletes later ones.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones; all if None.

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
    device = Accelerator().device
    config = replace(config, mixed_precision=chosen_precision(config.mixed_precision, device))
    model.to(device).eval()
    model.requires_grad_(False)
    folder = config.evidence_dir
    if folder is None and checkpoint_dir is not None:
        folder = Path(checkpoint_dir) / "evidence"

    made_by = model_fingerprint(model, tokenizer)

    def evidence() -> list[WindowCache]:
        return [
            cache_windows(
                model,
                tokenizer,
                examples,
                config.evidence(draws, seed),
                None if folder is None else Path(folder) / name,
                made_by=made_by,
                renew=resume_from_checkpoint == "none" and config.evidence_dir is None,
            )
            for name, examples, draws, seed in (
                ("train", train, config.num_draws, config.seed),
                ("validation", validation, config.num_validation_draws, 1234),
            )
        ]

    checkpoints = _checkpoints(checkpoint_dir, checkpoints_total_limit)
    made_of = fit_identity(made_by, train, validation)
    made_of["num_windows"] = config.num_draws * len(train)
    head = model.coupling_head
    return _fit(head, evidence, made_of, checkpoints, config, log, resume_from_checkpoint)


def fit_head(
    head: CoDDHead,
    train: WindowCache,
    validation: WindowCache,
    checkpoint_dir: str | Path | None = None,
    config: ConditionalConfig | None = None,
    log: Log | None = None,
    *,
    resume_from_checkpoint: str | Path = "latest",
    checkpoints_total_limit: int | None = 2,
) -> list[dict[str, float]]:
    """Trains a head in place on evidence alone; no backbone is there.

    Args:
        head: the head, bound to an output embedding if its emissions are tied.
        train: evidence that it learns from.
        validation: evidence that it is measured on.
        checkpoint_dir: receives the checkpoints, in `checkpoint_dir/conditional`.
        config: how to fit.
        log: told of every step.
        resume_from_checkpoint: `"latest"` goes on from the newest checkpoint there, if there is
            one; `"none"` deletes them and begins; a checkpoint's folder goes on from that, and
            deletes later ones.
        checkpoints_total_limit: how many checkpoints are kept, the newest ones; all if None.

    Returns:
        The validation history: `step`, `gain` (nats per masked token over factorized, all and by
        mask ratio), `loss` (the mean since the last entry) and `seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite; the message names the windows.
        OSError: the disk has no room for a checkpoint.
        ValueError: the checkpoint is another run's, or damaged.
    """
    config = config or ConditionalConfig()
    checkpoints = _checkpoints(checkpoint_dir, checkpoints_total_limit)
    evidence = [train, validation]
    made_of = {"num_windows": len(train), "evidence": [cache.identity() for cache in evidence]}
    return _fit(head, lambda: evidence, made_of, checkpoints, config, log, resume_from_checkpoint)


def _checkpoints(folder: str | Path | None, total_limit: int | None) -> Checkpoints | None:
    return None if folder is None else Checkpoints(Path(folder) / "conditional", total_limit)


def _fit(
    head: CoDDHead,
    evidence: Callable[[], list[WindowCache]],
    made_of: dict[str, Any],
    checkpoints: Checkpoints | None,
    config: ConditionalConfig,
    log: Log | None,
    resume_from_checkpoint: str | Path,
) -> list[dict[str, float]]:
    """`fit_head` with evidence that is made when it is known to be needed."""
    config = config.with_steps(made_of["num_windows"])
    if checkpoints is None and config.keep == "best":
        raise ValueError("`keep='best'` needs a `checkpoint_dir`, where the best one is kept.")
    accelerator = Accelerator()
    head.to(accelerator.device)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head_groups(head, config), betas=(0.9, 0.98), weight_decay=0.0)
    loop = StepLoop(
        "conditional fit",
        config,
        asdict(config) | {name: getattr(head.config, name) for name in OF_THE_HEAD} | made_of,
        {f"head.{name}": parameter for name, parameter in head.named_parameters()},
        [optimizer],
        checkpoints,
        log,
        kept=lambda history: [_best(history)["step"]] if config.keep == "best" else [],
    )
    resumed = loop.resume(resume_from_checkpoint, MAY_CHANGE)
    complete = resumed and loop.step >= config.max_steps
    if resumed:
        going_on = f"goes on from step {loop.step} of {config.max_steps}"
        loop.show(f"The conditional fit {'is complete' if complete else going_on}.")
    if not complete:
        train, validation = evidence()
    running = None

    def backward(step: int) -> tuple[dict[str, float], int, dict[str, str]]:
        nonlocal running
        rows = _rows_of_step(len(train), step, config)
        rate = warmup_then_cosine(step, config.warmup_steps, config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        loss, gain = step_gradients(head, train, rows, config, accelerator)
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad, reason = not_finite(head, train, rows)
            raise FloatingPointError(
                f"The loss is {loss} and its gradient's norm {norm} at step {step}, from the "
                f"windows {bad[:8] or rows.tolist()} of the evidence: lower `learning_rate` (now "
                f"{config.learning_rate}).{reason}"
            )
        running = gain if running is None else 0.95 * running + 0.05 * gain
        told = {"loss": loss, "gain": gain, "learning_rate": config.learning_rate * rate}
        shown = {"gain": f"{running:+.3f} nats/token"}
        return told, len(rows) * head.config.window_length, shown

    history = loop.run(backward, lambda: evaluate_head(head, validation))
    if config.keep == "best":
        best = _best([entry for entry in history if entry["step"] in checkpoints.steps()])
        loop.show(
            f"The best head is that of step {best['step']}: {best['gain']:+.3f} nats per token."
        )
        loop.restore(load_checkpoint(checkpoints.path(best["step"]))[0])
    return history


def _best(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The entry with the largest validation gain, the first of equals."""
    return max(history, key=lambda entry: entry["gain"])


def _rows_of_step(number: int, step: int, config: ConditionalConfig) -> torch.Tensor:
    """The windows of a step, a pure function of it: every epoch is a new permutation."""
    size = min(config.windows_per_batch, number)
    epoch, batch = divmod(step, number // size)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    return torch.randperm(number, generator=generator)[batch * size : (batch + 1) * size]
