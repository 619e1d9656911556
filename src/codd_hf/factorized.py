"""What a prediction is without a circuit: independent tokens, some of them never generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .circuits import Potentials


def forbidden_tokens(
    vocab_size: int,
    mask_token_id: int | None,
    forbidden_token_ids: list[int] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """`[vocab]` bool, True for tokens that are never generated; None if there are none."""
    ids = [*(forbidden_token_ids or [])] + ([] if mask_token_id is None else [mask_token_id])
    if not ids:
        return None
    forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    forbidden[ids] = True
    return forbidden


def without_tokens(logits: torch.Tensor, token_ids: Sequence[int | None]) -> torch.Tensor:
    """Logits `[..., vocab]` that rule some tokens out; None stands for no token."""
    ids = [i for i in token_ids if i is not None]
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device).long(), -torch.inf)


def trivial_potentials(vocab_size: int, device: torch.device) -> Potentials:
    """A circuit of one state that changes nothing."""
    zero = torch.zeros(1, device=device)
    return Potentials(zero, zero[None, None], zero[None, None].expand(1, 1, vocab_size))
