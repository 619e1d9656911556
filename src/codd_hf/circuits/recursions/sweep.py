"""One pass through a chain from left to right in which evidence may be replaced on the way.

Messages from the right are made once. At every position they meet the messages from the left, and
both together say all that the other positions know of the latent there. Whoever decides on the
token of that position may then replace its evidence, which the positions to its right take into
account: this is how tokens are drawn one by one, each from its exact conditional, in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..numerics import LOST_MASS, full_precision, logsumexp, safe_log, shifted_exp
from .chain import Chain

Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""`visit(position, around, rows)`, with `around` `[n, H]` the log-weights that all other positions
give to the latent, and `rows` `[n]` the rows it is asked for. Returns log-evidence `[n, H]`."""


@full_precision
def sweep(chain: Chain, visit: Visit) -> None:
    """Calls `visit` at every position, from left to right.

    What `visit` returns is the evidence of its position from then on; the chain's own evidence is
    that of the positions to the right. A row that needs log space is visited again from the start,
    so `visit` must do the same for a row each time.

    Args:
        chain: the chain; what its absent positions hold is ignored, and they are not visited with
            any meaning.
        visit: see [`Visit`].
    """
    every = torch.arange(len(chain.evidence), device=chain.device)
    fragile = _pass(chain, visit, every, exact=False)
    if not chain.cannot_underflow and bool(fragile.any()):
        rows = every[fragile]
        _pass(chain.select(rows), visit, rows, exact=True)


def _pass(chain: Chain, visit: Visit, rows: torch.Tensor, exact: bool) -> torch.Tensor:
    """Returns `[n]` bool, the rows that may have lost mass to rounding."""
    future = _futures(chain, exact)
    past = torch.full_like(future[0], -math.log(chain.evidence.shape[-1]))
    fragile = torch.zeros(len(rows), dtype=torch.bool, device=chain.device)
    for i, log_future in enumerate(future):
        moves, here = chain.moves(i), chain.at(i)
        if i > 0:
            moved = _push(chain, past, i, exact)
            past = moved if moves is None else torch.where(moves, moved, past)
        evidence = visit(i, past + log_future, rows)
        evidence = evidence if here is None else torch.where(here, evidence, 0)
        past = past + evidence
        highest = evidence.amax(-1)
        mass = logsumexp(past, -1)
        kept = mass - highest.masked_fill(highest == -torch.inf, 0)
        past = past - mass.masked_fill(mass == -torch.inf, 0)[:, None]
        met = logsumexp(past + log_future, -1)
        fragile |= torch.minimum(kept, met) <= math.log(LOST_MASS)
    return fragile


def _futures(chain: Chain, exact: bool) -> list[torch.Tensor]:
    """What the positions to the right say of each latent: log-weights `[n, H]`, the largest 0."""
    future = torch.zeros_like(chain.evidence[:, 0])
    futures = [future]
    for i in reversed(range(1, chain.evidence.shape[1])):
        weights = chain.evidence[:, i] + future
        if exact:
            pulled = logsumexp(weights[:, None] + chain.steps.log_matrix(i), 2)
        else:
            scaled, _ = shifted_exp(weights, -1)
            pulled = safe_log(chain.steps.backward(scaled, i))
        largest = pulled.amax(-1, keepdim=True)
        pulled = pulled - largest.masked_fill(largest == -torch.inf, 0)
        moves = chain.moves(i)
        future = pulled if moves is None else torch.where(moves, pulled, future)
        futures.append(future)
    return futures[::-1]


def _push(chain: Chain, log_message: torch.Tensor, position: int, exact: bool) -> torch.Tensor:
    if exact:
        return logsumexp(log_message[:, :, None] + chain.steps.log_matrix(position), 1)
    return safe_log(chain.steps.forward(log_message.exp(), position))
