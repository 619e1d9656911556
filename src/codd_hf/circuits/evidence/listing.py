"""The likeliest tokens of a prediction and the mass of all the others.

A large vocabulary's logits are by far the largest tensor of a step, so they are read once, a slice
that fits the processor's cache at a time, and never copied whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..potentials.circuit import exp_of_difference

SLICE_IN_CACHE, SLICE_ON_DEVICE = 1 << 21, 1 << 26
"""Numbers that are worked on at once on a CPU, and where few large kernels beat many small ones."""

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
    if end == size and scores.is_contiguous():  # then blocks are rows, which is faster
        rows = chosen + blocks * torch.arange(len(scores), device=scores.device)[:, None]
        candidates = scores.view(-1, BLOCK).index_select(0, rows.flatten()).view(-1, k * BLOCK)
    else:
        candidates = by_block.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
        candidates = torch.cat((candidates, scores[:, end:]), 1)
    values, found = candidates.topk(k, -1)
    inside = chosen.gather(1, (found // BLOCK).clamp(max=k - 1)) * BLOCK + found % BLOCK
    return values, torch.where(found < k * BLOCK, inside, found - k * BLOCK + end)


def list_likeliest(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    forbidden: torch.Tensor | None,
    sums: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits logits `[N, V]` over the temperature into the `k` largest and the rest.

    The rest is summed itself: 1 minus the sum of the listed is rounding error when that is 1. Not
    differentiable.

    Returns:
        The `k` largest, `[N, k]` in float32 or float64; their tokens, `[N, k]`; and the
        `logsumexp` of all others that are not forbidden, `[N, C]` by `sums` of groups.
    """
    size, at_once = logits.shape[-1], slice_size(logits.device)
    never = torch.zeros(0, dtype=torch.long, device=logits.device)
    if forbidden is not None:
        never = forbidden.nonzero()[:, 0]
    listed, tokens, others = [], [], []
    # More rows than are summed together: the search goes through maxima, which are few.
    for part in logits.split(max(2 * at_once // size, 1)):
        # Tokens that must not be listed are few and unlikely: out of a longer list, if at all.
        values, indices = likeliest(part, min(k + 1 + len(never), size))
        values = values.to(torch.promote_types(logits.dtype, torch.float32))
        out = torch.isin(indices, never)
        if bool(out.any()):
            values, order = values.masked_fill(out, -torch.inf).sort(-1, descending=True)
            indices = indices.gather(1, order)
        values, indices = values[:, : k + 1] / temperature, indices[:, :k]
        listed.append(values[:, :k])
        tokens.append(indices)
        largest = values[:, -1:].masked_fill(values[:, -1:] == -torch.inf, 0)
        weights = torch.empty_like(part[: max(at_once // 2 // size, 1)], dtype=values.dtype)
        pieces = (tensor.split(max(len(weights), 1)) for tensor in (part, indices, largest))
        for scores, own, shift in zip(*pieces, strict=True):
            rest = exp_of_difference(scores, shift, weights[: len(scores)], 1 / temperature)
            rest.scatter_(-1, own, 0.0).index_fill_(-1, never, 0.0)
            others.append(sums(rest).log() + shift)
    return torch.cat(listed), torch.cat(tokens), torch.cat(others)
