"""The likeliest tokens of a prediction and the mass of all the others.

A large vocabulary's logits are by far the largest tensor of a step, so they are read once, a slice
that fits the processor's cache at a time, and never copied whole.
"""

from __future__ import annotations

import torch

from .numerics import exp_of_difference

SLICE_IN_CACHE = 1 << 21
"""Numbers that are worked on at once on a CPU."""

SLICE_ON_DEVICE = 1 << 26
"""Likewise on an accelerator, where a few large kernels beat many small ones."""

BLOCK = 64
"""Tokens whose maximum stands for them all when the likeliest are looked for."""


def slice_size(device: torch.device) -> int:
    """Numbers that are worked on at once on a device."""
    return SLICE_IN_CACHE if device.type == "cpu" else SLICE_ON_DEVICE


def likeliest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest scores of each row `[N, V]` and where they are, both `[N, k]`, in order.

    The `k` largest lie in the `k` blocks with the largest maxima, so that one pass over the scores
    is enough to leave out nearly all of them.
    """
    size = scores.shape[-1]
    blocks = size // BLOCK
    if blocks < 4 * k:
        return scores.topk(k, -1)
    end = blocks * BLOCK
    by_block = scores[:, :end].unflatten(1, (blocks, BLOCK))
    chosen = by_block.amax(-1).topk(k, -1, sorted=False).indices
    candidates = by_block.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
    candidates = torch.cat((candidates, scores[:, end:]), 1)
    values, found = candidates.topk(k, -1)
    inside = chosen.gather(1, (found // BLOCK).clamp(max=k - 1)) * BLOCK + found % BLOCK
    return values, torch.where(found < k * BLOCK, inside, found - k * BLOCK + end)


def list_likeliest(
    logits: torch.Tensor, k: int, temperature: float = 1.0, forbidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits logits over the temperature into the `k` largest and the rest; not differentiable.

    Args:
        logits: `[N, V]`, of any floating dtype.
        k: from 1 to `V`.
        temperature: positive.
        forbidden: `[V]` bool, tokens that have no mass.

    Returns:
        The `k` largest, `[N, k]` in float32 or float64; their tokens, `[N, k]`; and the
        `logsumexp` of all others, `[N]`.
    """
    size = logits.shape[-1]
    never = None if forbidden is None else forbidden.nonzero()[:, 0]
    parts = logits.split(max(slice_size(logits.device) // size, 1))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.empty(len(parts[0]), size, dtype=dtype, device=logits.device)
    listed, indices, rest = [], [], []
    for part in parts:
        found = _list(part, k, temperature, never, weights[: len(part)])
        for kept, new in zip((listed, indices, rest), found, strict=True):
            kept.append(new)
    return torch.cat(listed), torch.cat(indices), torch.cat(rest)


def _list(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    never: torch.Tensor | None,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`list_likeliest` of a slice `[n, V]`; `weights`, of its shape, is for work.

    Tokens that must not be listed, `never` `[m]`, are few and unlikely: they are taken out of a
    longer list if they are in it.
    """
    size, number = logits.shape[-1], 0 if never is None else len(never)
    values, indices = likeliest(logits, min(k + 1 + number, size))
    values = values.to(weights.dtype)
    if number:
        out = torch.isin(indices, never)
        if bool(out.any()):
            values, order = values.masked_fill(out, -torch.inf).sort(-1, descending=True)
            indices = indices.gather(1, order)
        values, indices = values[:, : k + 1], indices[:, : k + 1]
    values = values / temperature
    if k == size:
        return values, indices, torch.full_like(values[:, 0], -torch.inf)
    # Summed over the others: 1 minus the sum of the listed is rounding error when that is 1.
    largest = values[:, k:]
    largest = largest.masked_fill(largest == -torch.inf, 0)
    exp_of_difference(logits, largest, out=weights, factor=1 / temperature)
    weights.scatter_(-1, indices[:, :k], 0.0)
    if number:
        weights.index_fill_(-1, never, 0.0)
    return values[:, :k], indices[:, :k], weights.sum(-1).log() + largest[:, 0]
