"""The evidence of the best token: what Viterbi decoding needs of the vocabulary.

A sum over tokens is a matrix product; a maximum is not, and would go through all `N H V` pairs of
state and token for `N` predictions. Most tokens are too improbable to be any state's best.
"""

from __future__ import annotations

import torch

from .evidence.dense import ELEMENTS_AT_ONCE, EmissionSummary, columns_of_lists, summarise
from .numerics import full_precision
from .potentials.emissions import Emission

FIRST_LIST = 64
"""How many of a prediction's likeliest tokens are tried first where one is looked for."""


@full_precision
def best_evidence(
    emission: Emission,
    log_phi: torch.Tensor,
    positions: torch.Tensor,
    summary: EmissionSummary | None = None,
) -> torch.Tensor:
    """`max_v log phi(v) + log E(z, v)`, `[N, H]`, of `log_phi [N, V]`; exact.

    A token that is not among the `k` likeliest adds at most the probability of the last of them
    and the state's largest emission. Predictions for which that does not rule out all others are
    looked at again with a longer list.

    Args:
        emission: the emission.
        log_phi: `[N, V]`.
        positions: `[N]`.
        summary: of this emission, if at hand: saves a pass over it.
    """
    if summary is None:
        summary = summarise(emission)
    best = log_phi.new_empty(len(log_phi), emission.num_latents)
    untied = len(summary.log_max) > 1
    largest = summary.log_max[positions if untied else torch.zeros_like(positions)]
    rows, size = torch.arange(len(log_phi), device=log_phi.device), FIRST_LIST
    while len(rows):
        size = min(size, emission.vocab_size)
        number = max(ELEMENTS_AT_ONCE // (size * emission.num_latents), 1)
        settled = []
        for part in rows.split(number):
            values, tokens = log_phi[part].topk(size, -1)
            columns = columns_of_lists(emission, tokens, positions[part])
            best[part] = (columns + values[..., None]).amax(1).to(best.dtype)
            settled.append((best[part] >= values[:, -1:] + largest[part]).all(1))
        rows = rows[~torch.cat(settled)] if size < emission.vocab_size else rows[:0]
        size *= 4
    return best
