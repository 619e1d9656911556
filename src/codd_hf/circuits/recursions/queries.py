"""Sums, posteriors, samples and the best path of a chain; one pass with evidence that changes.

Each is computed in probabilities first. Rows whose mass all but vanishes are repeated in logs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..numerics import full_precision
from ..random import Generators, uniform
from .chain import Algebra, Chain, logs, probabilities

Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""`visit(position, around, rows)`, with `around` `[n, H]` the log-weights that all other positions
give to the latent, and `rows` `[n]` the rows it is asked for. Returns log-evidence `[n, H]`."""


@dataclass
class Filter:
    """The result of a forward pass.

    Attributes:
        log_partition: `[B]`, log of the sum of `w` over all paths; -inf where it is zero.
        messages: `[B, L, H]`, distribution of `z_i` given the evidence up to `i`; at an absent
            position, of the last present one before it.
        rows: `[n]`, those that were repeated in logs.
        log_messages: `[n, L, H]`, their messages; None if there are none.
    """

    log_partition: torch.Tensor
    messages: torch.Tensor
    rows: torch.Tensor
    log_messages: torch.Tensor | None = None

    def part(self, first: int, size: int) -> Filter:
        """The result of some consecutive rows."""
        every, rows, log_messages = slice(first, first + size), self.rows, None
        if len(rows):
            inside = (rows >= first) & (rows < first + size)
            rows, log_messages = rows[inside] - first, self.log_messages[inside]
        return Filter(self.log_partition[every], self.messages[every], rows, log_messages)


@full_precision
def forward_filter(chain: Chain) -> Filter:
    """The sum over all paths; differentiable in all potentials."""
    algebra, log_scale = probabilities(chain)
    messages, totals = algebra.filtered()
    log_partition = log_scale + algebra.logs(totals).sum(1)
    if chain.cannot_underflow:
        return Filter(log_partition, messages, totals.new_empty(0, dtype=torch.long))
    # Each step kept enough mass, but what is rounded to zero early may win late: the past must also
    # meet the future. (The gradient of a message is the future's weight over that same total.)
    with torch.no_grad():
        met = algebra.smoothed(messages)[1]
    rows = (torch.minimum(totals, met) <= chain.smallest).any(1).nonzero()[:, 0]
    if len(rows) == 0:
        return Filter(log_partition, messages, rows)
    algebra = logs(chain.select(rows))
    log_messages, totals = algebra.filtered()
    log_partition = log_partition.index_put((rows,), totals.sum(1))
    messages = messages.index_put((rows,), algebra.probs(log_messages))
    return Filter(log_partition, messages, rows, log_messages)


@full_precision
def posterior(chain: Chain, filtered: Filter) -> torch.Tensor:
    """`[B, L, H]`: the distribution of each latent given all evidence; zeros at absent ones."""
    smoothed, totals = probabilities(chain)[0].smoothed(filtered.messages)
    if chain.cannot_underflow:
        return smoothed
    lost = (totals <= chain.smallest).any(1)
    lost[filtered.rows] = True
    rows = lost.nonzero()[:, 0]
    if len(rows):
        algebra = logs(chain.select(rows))
        smoothed = smoothed.index_put((rows,), algebra.smoothed(algebra.filtered()[0])[0])
    return smoothed


@full_precision
def sample_paths(
    chain: Chain,
    filtered: Filter,
    sample_shape: tuple[int, ...] = (),
    generator: Generators = None,
) -> torch.Tensor:
    """Joint samples of latent paths, `[*sample_shape, B, L]`, from the last position back.

    What stands at absent positions has no meaning. One uniform number is used per row, sample and
    position, whatever is present.
    """
    batch, length, _ = chain.evidence.shape
    samples, rows = int(torch.Size(sample_shape).numel()), filtered.rows
    numbers = uniform((batch, samples, length), generator, chain.device).transpose(0, 1)
    paths = probabilities(chain)[0].drawn(filtered.messages, numbers)
    if len(rows):
        again = logs(chain.select(rows))
        paths[:, rows] = again.drawn(filtered.log_messages, numbers[:, rows])
    return paths.reshape(*sample_shape, batch, length)


@full_precision
def best_path(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """The path of largest weight `[B, L]` and its log-weight `[B]` (Viterbi)."""
    origins = {}

    def step(message: torch.Tensor, i: int) -> torch.Tensor:
        best, origins[i] = chain.steps.best_into(message, i)
        return best

    def before(state: torch.Tensor, i: int) -> torch.Tensor:
        return origins[i].gather(1, state[:, None])[:, 0]

    best = replace(logs(chain), total=lambda x: x.amax(-1, keepdim=True), step=step)
    messages, totals = best.filtered()
    return best.trace(messages[:, -1].argmax(-1), before), totals.sum(1)


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
