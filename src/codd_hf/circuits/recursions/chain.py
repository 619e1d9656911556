r"""One recursion over a chain of non-negative potentials.

The object is the unnormalised distribution of a latent path `z_1 ... z_L` over `H` states,

    w(z) = pi(z_1) e_1(z_1) \prod_{i>1} A_i(z_{i-1}, z_i) e_i(z_i),

where the evidence `e_i` carries what is known or believed of the token at position `i`. Messages
pass from neighbour to neighbour. An algebra says what their sums and products are: `probabilities`,
rescaled at every step, where a step is one matrix product in float32, or `logs`, which cannot
underflow. (A maximum in place of the sum gives the best path.)

An absent position is no part of the chain: its neighbours are joined as if it were not there.

Source: Rabiner (1989), sections III and V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..context.copies import CopySteps
from ..numerics import LOST_MASS, full_precision, logsumexp, normalised_exp, safe_log, shifted_exp
from ..potentials.transitions import StepTransitions
from ..random import Generators, draw_categorical, uniform

SAFE_RANGE = 32.0
"""Transitions whose entries are all within this many nats of the largest need no second look.

What float32 rounds to zero in a step is then less than `exp(-87 + 32)` of the mass that is kept,
and the future can favour it over what is kept by `exp(32)` at most: the error stays below
`H exp(-23)`. The log-space repetition, and the search for rows that need it, are skipped.
"""


@dataclass
class Chain:
    """A batch of chains.

    Attributes:
        steps: the transitions.
        evidence: `[B, L, H]` log-evidence, the initial distribution included.
        present: `[B, L]` bool; None where all positions are.
    """

    steps: StepTransitions | CopySteps
    evidence: torch.Tensor
    present: torch.Tensor | None = None

    @classmethod
    def start(
        cls,
        initial: torch.Tensor,
        steps: StepTransitions | CopySteps,
        evidence: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> Chain:
        """A chain with log-potentials `initial`, `[H]` or `[B, L, H]`, of where it starts.

        They join the evidence of each row's first present position: messages start uniform.
        """
        start = initial + math.log(initial.shape[-1])
        if present is None:
            first = evidence[:, :1] + (start if start.ndim == 1 else start[:, :1])
            return cls(steps, torch.cat((first, evidence[:, 1:]), 1))
        first = present & (present.cumsum(1) == 1)
        return cls(steps, torch.where(first[..., None], evidence + start, evidence), present)

    @property
    def device(self) -> torch.device:
        """Where the evidence is."""
        return self.evidence.device

    @cached_property
    def cannot_underflow(self) -> bool:
        """Whether no row can need log space."""
        return self.steps.log_range <= SAFE_RANGE

    @property
    def smallest(self) -> float:
        """Mass up to here counts as lost in a step."""
        return 0.0 if self.cannot_underflow else LOST_MASS

    @cached_property
    def moves(self) -> torch.Tensor | None:
        """`[B, L]` bool: is there a step into the position? None where there is in all rows."""
        return None if self.present is None else self.present & (self.present.cumsum(1) > 1)

    def select(self, rows: torch.Tensor) -> Chain:
        """The chains of some rows."""
        present = None if self.present is None else self.present[rows]
        return Chain(self.steps.select(rows), self.evidence[rows], present)


@dataclass
class Algebra:
    """The recursion over a chain, whatever sums and products are.

    A message is `[B, H]`. Its total, `[B, 1]`, is taken out of it at every position.

    Attributes:
        chain: the chain.
        weights: `L` times `[B, H]`, the evidence.
        uniform: `[B, H]`, the message before the first position.
        one: `[B, H]`, the weights that change nothing.
        times: the product of two messages.
        total: the sum `[..., 1]` of a message.
        without: a message without its total.
        step: the message after the step into a position.
        step_back: the weights before the step into a position.
        column: the weights `[*S, B, H]` of the latents before states `[*S, B]` at a position.
        probs: the probabilities of a message, up to a factor.
        logs: their logarithms.
        of_logs: the message of logarithms, up to a factor.
    """

    chain: Chain
    weights: tuple[torch.Tensor, ...]
    uniform: torch.Tensor
    one: torch.Tensor
    times: Callable
    total: Callable
    without: Callable
    step: Callable
    step_back: Callable
    column: Callable
    probs: Callable
    logs: Callable
    of_logs: Callable

    def forward(self, first=0, last=None, message=None, weigh=None) -> Iterator[tuple]:
        """Yields the messages of positions, and the totals that were taken out of them.

        Args:
            first: the first position.
            last: the last one; default the chain's.
            message: of the position before `first`; default uniform.
            weigh: maps a position and the message that arrives there to its evidence; default the
                chain's.
        """
        message, chain = self.uniform if message is None else message, self.chain
        for i in range(first, len(self.weights) if last is None else last + 1):
            if i > 0:
                message = _where(chain.moves, i, self.step(message, i), message)
            weights = self.weights[i] if weigh is None else weigh(i, message)
            message = _where(chain.present, i, self.times(message, weights), message)
            total = self.total(message)
            message = self.without(message, total)
            yield message, total

    def backward(self, first=0, last=None, future=None) -> Iterator[torch.Tensor]:
        """Yields what the positions to the right say of each latent, from `last` to `first`.

        Args:
            first: the leftmost position.
            last: the rightmost one; default the chain's.
            future: what is yielded there; default nothing.
        """
        future = self.one if future is None else future
        for i in range(len(self.weights) - 1 if last is None else last, first - 1, -1):
            yield future
            if i > first:
                past = self.step_back(self.times(self.weights[i], future), i)
                past = self.without(past, past.amax(-1, keepdim=True))
                future = _where(self.chain.moves, i, past, future)

    def trace(self, state: torch.Tensor, before: Callable) -> torch.Tensor:
        """The paths `[*S, B, L]` that end in `state` `[*S, B]`.

        `before(state, i)` gives the latents before those of position `i`.
        """
        path, moves = [state], self.chain.moves
        for i in range(len(self.weights) - 1, 0, -1):
            origin = before(state, i)
            state = origin if moves is None else torch.where(moves[:, i], origin, state)
            path.append(state)
        return torch.stack(path[::-1], -1)

    def filtered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All messages `[B, L, H]` and totals `[B, L]`."""
        messages, totals = zip(*self.forward(), strict=True)
        return torch.stack(messages, 1), torch.cat(totals, 1)

    def smoothed(self, messages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posteriors of the latents `[B, L, H]`, and the mass `[B, L]` of past and future."""
        probs, totals, pasts = [], [], messages.unbind(1)
        for i, future in zip(range(len(pasts) - 1, -1, -1), self.backward(), strict=True):
            joint = self.times(pasts[i], future)
            totals.append(self.total(joint))
            law = self.probs(self.without(joint, totals[-1]))
            probs.append(_where(self.chain.present, i, law, 0))
        return torch.stack(probs[::-1], 1), torch.cat(totals[::-1], 1)

    def drawn(self, messages: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Paths `[S, B, L]` from their posterior, by uniform numbers `[S, B, L]`."""
        numbers, messages = numbers.unbind(-1), messages.unbind(1)

        def before(state: torch.Tensor, i: int) -> torch.Tensor:
            weights = self.times(messages[i - 1], self.column(state, i))
            return draw_categorical(self.probs(weights), numbers[i - 1])

        ends = self.probs(messages[-1]).expand(len(numbers[-1]), -1, -1)
        return self.trace(draw_categorical(ends, numbers[-1]), before)


def _where(rows: torch.Tensor | None, i: int, value: torch.Tensor, other) -> torch.Tensor:
    """`[B, H]`: `value` where `rows` `[B, L]` hold at position `i`, or everywhere if None."""
    return value if rows is None else torch.where(rows[:, i, None], value, other)


def probabilities(chain: Chain) -> tuple[Algebra, torch.Tensor]:
    """The algebra of probabilities, and the log `[B]` of what evidence and steps leave out."""
    weights, shift = shifted_exp(chain.evidence, 2)
    shift, scales = shift[..., 0], chain.steps.log_scales(*reversed(chain.evidence.shape[:2]))
    if chain.present is not None:
        shift, scales = torch.where(chain.present, shift, 0), scales * chain.moves[:, 1:].T
    algebra = Algebra(
        chain,
        weights=weights.unbind(1),  # the backward pass of a slice would fill all positions
        uniform=torch.full_like(weights[:, 0], 1 / weights.shape[-1]),
        one=torch.ones_like(weights[:, 0]),
        times=torch.mul,
        total=lambda x: x.sum(-1, keepdim=True),
        without=lambda x, total: x / total.masked_fill(total <= chain.smallest, 1),
        step=chain.steps.forward,
        step_back=chain.steps.backward,
        column=chain.steps.column,
        probs=lambda x: x,
        logs=safe_log,
        of_logs=lambda x: shifted_exp(x, -1)[0],
    )
    return algebra, shift.sum(1) + scales.sum(0)


def logs(chain: Chain) -> Algebra:
    """The algebra of logarithms."""

    def column(state: torch.Tensor, i: int) -> torch.Tensor:
        matrix = chain.steps.log_matrix(i).expand(state.shape[-1], -1, -1)
        return matrix.transpose(1, 2)[torch.arange(len(matrix), device=state.device), state]

    first = chain.evidence[:, 0]
    return Algebra(
        chain,
        weights=chain.evidence.unbind(1),
        uniform=torch.full_like(first, -math.log(first.shape[-1])),
        one=torch.zeros_like(first),
        times=torch.add,
        total=lambda x: logsumexp(x, -1)[..., None],
        without=lambda x, total: x - total.masked_fill(total == -torch.inf, 0),
        step=lambda x, i: logsumexp(x[:, :, None] + chain.steps.log_matrix(i), 1),
        step_back=lambda x, i: logsumexp(x[:, None] + chain.steps.log_matrix(i), 2),
        column=column,
        probs=normalised_exp,
        logs=lambda x: x,
        of_logs=lambda x: x,
    )


@dataclass
class Filter:
    """The result of a forward pass.

    Attributes:
        log_partition: `[B]`, log of the sum of `w` over all paths; -inf where it is zero.
        messages: `[B, L, H]`, distribution of `z_i` given the evidence up to `i`; at an absent
            position, of the last present one before it.
        lost: `[n]` rows whose mass all but vanished, which are repeated in logs.
    """

    log_partition: torch.Tensor
    messages: torch.Tensor
    lost: torch.Tensor

    def part(self, rows: slice) -> Filter:
        """The result of some rows."""
        lost = self.lost[(self.lost >= rows.start) & (self.lost < rows.stop)] - rows.start
        return Filter(self.log_partition[rows], self.messages[rows], lost)


@full_precision
def forward_filter(chain: Chain) -> Filter:
    """The sum over all paths; differentiable in all potentials."""
    algebra, log_scale = probabilities(chain)
    messages, totals = algebra.filtered()
    log_partition = log_scale + algebra.logs(totals).sum(1)
    lost = totals.new_empty(0, dtype=torch.long)
    if not chain.cannot_underflow:
        # Each step kept enough mass, but what is rounded to zero early may win late: the past must
        # also meet the future. (The gradient of a message is the future's weight over that total.)
        with torch.no_grad():
            met = algebra.smoothed(messages)[1]
        lost = (torch.minimum(totals, met) <= chain.smallest).any(1).nonzero()[:, 0]
    if len(lost):
        algebra = logs(chain.select(lost))
        log_messages, totals = algebra.filtered()
        log_partition = log_partition.index_put((lost,), totals.sum(1))
        messages = messages.index_put((lost,), algebra.probs(log_messages))
    return Filter(log_partition, messages, lost)


@full_precision
def posterior(chain: Chain, filtered: Filter) -> torch.Tensor:
    """`[B, L, H]`: the distribution of each latent given all evidence; zeros at absent ones."""
    smoothed = probabilities(chain)[0].smoothed(filtered.messages)[0]
    if len(filtered.lost):
        again = logs(chain.select(filtered.lost))
        exact = again.smoothed(again.filtered()[0])[0]
        smoothed = smoothed.index_put((filtered.lost,), exact)
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
    shape = (len(filtered.messages), math.prod(sample_shape), filtered.messages.shape[1])
    numbers = uniform(shape, generator, chain.device).transpose(0, 1)
    paths = probabilities(chain)[0].drawn(filtered.messages, numbers)
    if len(filtered.lost):
        again = logs(chain.select(filtered.lost))
        paths[:, filtered.lost] = again.drawn(again.filtered()[0], numbers[:, filtered.lost])
    return paths.reshape(*sample_shape, *filtered.messages.shape[:2])


@full_precision
def best_path(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """The path of largest weight `[B, L]` and its log-weight `[B]` (Viterbi)."""
    origins = {}

    def step(message: torch.Tensor, i: int) -> torch.Tensor:
        best, origins[i] = (message[:, :, None] + chain.steps.log_matrix(i)).max(1)
        return best

    def before(state: torch.Tensor, i: int) -> torch.Tensor:
        return origins[i].gather(1, state[:, None])[:, 0]

    best = replace(logs(chain), total=lambda x: x.amax(-1, keepdim=True), step=step)
    messages, totals = best.filtered()
    return best.trace(messages[:, -1].argmax(-1), before), totals.sum(1)
