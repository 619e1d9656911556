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
    dtype = torch.promote_types(logits.dtype, torch.float32)
    bias = torch.zeros(size, dtype=dtype, device=logits.device)
    if forbidden is not None:
        bias.masked_fill_(forbidden, -torch.inf)
    parts = logits.split(max(slice_size(logits.device) // size, 1))
    scores = torch.empty(len(parts[0]), size, dtype=dtype, device=logits.device)
    listed, indices, rest = [], [], []
    for part in parts:
        torch.add(part, bias, out=scores[: len(part)])
        found = _list_in_place(scores[: len(part)], k, temperature)
        for kept, new in zip((listed, indices, rest), found, strict=True):
            kept.append(new)
    return torch.cat(listed), torch.cat(indices), torch.cat(rest)


def _list_in_place(
    scores: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`list_likeliest` of scores `[n, V]`, which are used up."""
    if temperature != 1:
        scores.div_(temperature)
    if k == scores.shape[-1]:
        listed, indices = scores.topk(k, -1)
        return listed, indices, torch.full_like(listed[:, 0], -torch.inf)
    values, indices = likeliest(scores, k + 1)
    # Summed over the others: 1 minus the sum of the listed is rounding error when that is 1.
    scores.scatter_(-1, indices[:, :k], -torch.inf)
    largest = values[:, k:]
    largest = largest.masked_fill(largest == -torch.inf, 0)
    rest = exp_of_difference(scores, largest, out=scores).sum(-1).log() + largest[:, 0]
    return values[:, :k], indices[:, :k], rest
