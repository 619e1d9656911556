"""Predictions without a circuit: independent tokens, some of which are never generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .potentials import Potentials


def forbidden_tokens(
    vocab_size: int,
    mask_token_id: int | None,
    forbidden_token_ids: Sequence[int] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """`[vocab]` bool, True for tokens that are never generated; None if there are none."""
    ids = [i for i in (mask_token_id, *(forbidden_token_ids or ())) if i is not None]
    if not ids:
        return None
    ids = torch.tensor(ids, device=device)
    return torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill(0, ids, True)


def without_tokens(
    logits: torch.Tensor, mask_token_id: int | None, forbidden_token_ids: Sequence[int] | None
) -> torch.Tensor:
    """Logits `[..., vocab]` that rule out the tokens of `forbidden_tokens`."""
    ids = mask_token_id, forbidden_token_ids
    forbidden = forbidden_tokens(logits.shape[-1], *ids, logits.device)
    return logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)


def trivial_potentials(vocab_size: int, device: torch.device) -> Potentials:
    """A circuit of one state that changes nothing."""
    zero = torch.zeros(1, device=device)
    return Potentials(zero, zero[None, None], zero[None, None].expand(1, 1, vocab_size))
