"""The likeliest tokens of a prediction and the mass of all the others.

A large vocabulary's logits are by far the largest tensor of a step, so they are read once, a slice
that fits the processor's cache at a time, and never copied whole.
"""

from __future__ import annotations

import torch

from ..numerics import exp_of_difference

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
    temperature: float = 1.0,
    forbidden: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    num_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits logits over the temperature into the `k` largest and the rest; not differentiable.

    Args:
        logits: `[N, V]`, of any floating dtype.
        k: from 1 to `V`.
        temperature: positive.
        forbidden: `[V]` bool, tokens that have no mass.
        groups: `[V]`, to which group each token belongs; default, all to one.
        num_groups: how many there are.

    Returns:
        The `k` largest, `[N, k]` in float32 or float64; their tokens, `[N, k]`; and the
        `logsumexp` of all others, group by group, `[N, num_groups]`.
    """
    size = logits.shape[-1]
    never = None if forbidden is None else forbidden.nonzero()[:, 0]
    found = []
    # More rows than are summed together: the search goes through maxima, which are few.
    for part in logits.split(max(2 * slice_size(logits.device) // size, 1)):
        listed, indices = _list(part, min(k + 1, size), never)
        listed = listed / temperature
        others = _log_sum_of_others(
            part, indices[:, :k], listed[:, k:], temperature, never, groups, num_groups
        )
        found.append((listed[:, :k], indices[:, :k], others))
    listed, indices, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return listed, indices, rest


def _list(
    logits: torch.Tensor, k: int, never: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest of each row `[n, V]`, in float32 at least, and their tokens.

    Tokens that must not be listed, `never` `[m]`, are few and unlikely: they are taken out of a
    longer list if they are in it.
    """
    number = 0 if never is None else len(never)
    values, indices = likeliest(logits, min(k + number, logits.shape[-1]))
    values = values.to(torch.promote_types(logits.dtype, torch.float32))
    if number:
        out = torch.isin(indices, never)
        if bool(out.any()):
            values, order = values.masked_fill(out, -torch.inf).sort(-1, descending=True)
            indices = indices.gather(1, order)
    return values[:, :k], indices[:, :k]


def _log_sum_of_others(
    logits: torch.Tensor,
    indices: torch.Tensor,
    largest: torch.Tensor,
    temperature: float,
    never: torch.Tensor | None,
    groups: torch.Tensor | None,
    num_groups: int,
) -> torch.Tensor:
    """`[n, num_groups]`: `logsumexp` of logits `[n, V]` over the temperature without some tokens.

    They are summed themselves: 1 minus the sum of the listed is rounding error when that is 1.

    Args:
        logits: the logits.
        indices: `[n, k]` tokens to leave out.
        largest: `[n, 1]`, the largest of what is summed; `[n, 0]` if nothing is.
        temperature: positive.
        never: `[m]` further tokens to leave out, if any.
        groups: as in `list_likeliest`.
        num_groups: likewise.
    """
    if not largest.shape[1]:
        return logits.new_full((len(logits), num_groups), -torch.inf, dtype=largest.dtype)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    rows = max(slice_size(logits.device) // 2 // logits.shape[-1], 1)
    weights = torch.empty_like(logits[:rows], dtype=largest.dtype)
    sums = []
    for part, left_out, shift in zip(
        *(t.split(rows) for t in (logits, indices, largest)), strict=True
    ):
        weights = weights[: len(part)]
        exp_of_difference(part, shift, out=weights, factor=1 / temperature)
        weights.scatter_(-1, left_out, 0.0)
        if never is not None:
            weights.index_fill_(-1, never, 0.0)
        sums.append(sum_by_group(weights, groups, num_groups))
    return torch.cat(sums).log() + largest


def sum_by_group(
    weights: torch.Tensor, groups: torch.Tensor | None, num_groups: int
) -> torch.Tensor:
    """`[..., num_groups]`: sums of weights `[..., V]` by `groups` `[V]`; None: all are one."""
    if groups is None:
        return weights.sum(-1, keepdim=True)
    sums = weights.new_zeros(*weights.shape[:-1], num_groups)
    return sums.scatter_add(-1, groups.expand_as(weights), weights)
