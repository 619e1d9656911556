"""One pass through a chain in which evidence is decided on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..numerics import full_precision
from .chain import Algebra, Chain, logs, probabilities

Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""`visit(position, around, rows)`, with `around` `[n, H]` the log-weights that all other positions
give to the latent, and `rows` `[n]` the rows it is asked for. Returns log-evidence `[n, H]`."""


@full_precision
def sweep(chain: Chain, visit: Visit) -> None:
    """Calls `visit` at every position, from left to right, and takes its evidence from there.

    The evidence that `visit` returns counts for the positions to its right; the chain's own counts
    for those to its left. So tokens are drawn one by one, each from its exact conditional, in one
    pass. A row that needs logs is visited again from the start: `visit` must do the same for a row
    each time. Visits of absent positions have no meaning.
    """
    every = torch.arange(len(chain.evidence), device=chain.device)
    lost = _sweep(probabilities(chain)[0], visit, every)
    if not chain.cannot_underflow and bool(lost.any()):
        _sweep(logs(chain.select(every[lost])), visit, every[lost])


def _sweep(algebra: Algebra, visit: Visit, rows: torch.Tensor) -> torch.Tensor:
    """Returns `[n]` bool, the rows that lost mass to rounding, if it is of probabilities."""
    futures = list(algebra.backward())[::-1]
    log_futures = [algebra.logs(future) for future in futures]

    def weigh(i: int, arriving: torch.Tensor) -> torch.Tensor:
        return algebra.of_logs(visit(i, algebra.logs(arriving) + log_futures[i], rows))

    lost = torch.zeros_like(rows, dtype=torch.bool)
    for future, (message, total) in zip(futures, algebra.forward(weigh=weigh), strict=True):
        met = algebra.total(algebra.times(message, future))
        lost |= (torch.minimum(total, met) <= algebra.chain.smallest)[:, 0]
    return lost
