"""What a prediction is without a circuit: independent tokens, some of them never generated."""

from __future__ import annotations

import torch

from . import Potentials


def forbidden_tokens(
    vocab_size: int,
    mask_token_id: int | None,
    forbidden_token_ids: list[int] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """`[vocab]` bool, True for tokens that are never generated; None if there are none."""
    ids = _never(mask_token_id, forbidden_token_ids)
    if not ids:
        return None
    forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    forbidden[ids] = True
    return forbidden


def without_tokens(
    logits: torch.Tensor, mask_token_id: int | None, forbidden_token_ids: list[int] | None
) -> torch.Tensor:
    """Logits `[..., vocab]` that rule out the tokens of `forbidden_tokens`."""
    ids = _never(mask_token_id, forbidden_token_ids)
    if not ids:
        return logits
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), -torch.inf)


def _never(mask_token_id: int | None, forbidden_token_ids: list[int] | None) -> list[int]:
    return [*(forbidden_token_ids or [])] + ([] if mask_token_id is None else [mask_token_id])


def trivial_potentials(vocab_size: int, device: torch.device) -> Potentials:
    """A circuit of one state that changes nothing."""
    zero = torch.zeros(1, device=device)
    return Potentials(zero, zero[None, None], zero[None, None].expand(1, 1, vocab_size))
