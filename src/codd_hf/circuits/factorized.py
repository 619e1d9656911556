"""Predictions without a circuit: independent tokens, some of which are never generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .distribution.coupled import CoupledCategorical
from .potentials.circuit import DenseEmission, Potentials, StepTransitions


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
    forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    return forbidden.index_fill(0, torch.tensor(ids, device=device), True)


def without_tokens(
    logits: torch.Tensor, mask_token_id: int | None, forbidden_token_ids: Sequence[int] | None
) -> torch.Tensor:
    """Logits `[..., vocab]` that rule out the tokens of `forbidden_tokens`."""
    ids = mask_token_id, forbidden_token_ids
    forbidden = forbidden_tokens(logits.shape[-1], *ids, logits.device)
    return logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)


def without_circuit(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    observed: torch.Tensor,
    present: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> CoupledCategorical:
    """The factorized distribution over windows; the arguments are `CoupledCategorical`'s."""
    zero = torch.zeros(1, device=logits.device)
    emission = DenseEmission(zero[None, None].expand(1, 1, logits.shape[-1]))
    return CoupledCategorical(
        logits,
        Potentials(zero, StepTransitions(zero[None, None]), emission),  # one state: no change
        tokens=tokens,
        observed=observed,
        present=present,
        active=torch.zeros(len(logits), dtype=torch.bool, device=logits.device),
        temperature=temperature,
    )
