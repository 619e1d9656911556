"""The evidence of the best token: what Viterbi decoding needs of the vocabulary.

A sum over tokens is a matrix product; a maximum is not, and would go through all `N H V` pairs of
state and token for `N` predictions. Most tokens are too improbable to be any state's best.
"""

from __future__ import annotations

import torch

from ..numerics import full_precision
from ..potentials.emissions import Emission, stored_by_latent
from ..potentials.tables import ELEMENTS_AT_ONCE, EmissionTables

FIRST_LIST = 64
"""How many of a prediction's likeliest tokens are tried first where one is looked for."""


@full_precision
def best_evidence(
    log_phi: torch.Tensor, positions: torch.Tensor, tables: EmissionTables
) -> torch.Tensor:
    """`max_v log phi(v) + log E(z, v)`, `[N, H]`, of `log_phi [N, V]`; exact.

    A token that is not among the `k` likeliest adds at most the probability of the last of them
    and the state's largest emission. Predictions for which that does not rule out all others are
    looked at again with a longer list.

    Args:
        log_phi: `[N, V]`.
        positions: `[N]`.
        tables: of the emission.
    """
    emission = tables.emission
    best = log_phi.new_empty(len(log_phi), emission.num_latents)
    largest = tables.log_max[positions % len(tables.log_max)]
    rows, size = torch.arange(len(log_phi), device=log_phi.device), FIRST_LIST
    while len(rows):
        size = min(size, emission.vocab_size)
        number = max(ELEMENTS_AT_ONCE // (size * emission.num_latents), 1)
        settled = []
        for part in rows.split(number):
            values, tokens = log_phi[part].topk(size, -1)
            columns = _columns(emission, tokens, positions[part])
            best[part] = (columns + values[..., None]).amax(1).to(best.dtype)
            settled.append((best[part] >= values[:, -1:] + largest[part]).all(1))
        rows = rows[~torch.cat(settled)] if size < emission.vocab_size else rows[:0]
        size *= 4
    return best


def _columns(emission: Emission, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`log E_i(., v)`, `[N, k, H]`, of lists of tokens `[N, k]` at positions `[N]`."""
    if not stored_by_latent(emission):
        return emission.columns(tokens, positions[:, None])
    # Twice as fast as `columns`, which goes through all states for one token at a time.
    columns = emission.log_potential[0].index_select(1, tokens.flatten())
    return columns.unflatten(1, tokens.shape).permute(1, 2, 0)
