"""What a head gains over factorized predictions, and how that depends on its parameters."""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator

from ...modeling_head import CoDDHead
from ..evidence.cache import WindowCache
from ..evidence.noised_windows import NoisedWindows
from ..settings import ConditionalConfig
from .counting import summing_dtype

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the noise levels that gains are told for."""


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
    return gains_by_level(gain, count, cache.level)


def gains_by_level(
    gain: torch.Tensor, masked: torch.Tensor, level: torch.Tensor
) -> dict[str, float]:
    """Mean gain in nats per masked token, of all windows and of those of each range of levels.

    Args:
        gain: `[N]`, nats of each window.
        masked: `[N]`, masked tokens of each window.
        level: `[N]`, the probability with which they were masked.
    """
    result = {"gain": (gain.sum() / masked.sum()).item()}
    for low, high in itertools.pairwise(LEVELS):
        inside = (level >= low) & ((level < high) | (high == LEVELS[-1]))
        count = masked[inside].sum().clamp(min=1)
        result[f"gain_{low:.2f}-{high:.2f}"] = (gain[inside].sum() / count).item()
    return result


def step_gradients(
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
def not_finite(head: CoDDHead, cache: WindowCache, rows: torch.Tensor) -> tuple[list[int], str]:
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
