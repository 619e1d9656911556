r"""Exact inference in a chain of non-negative potentials.

The object is the unnormalised law of a latent path `z_1 ... z_L` over `H` states,

    w(z) = pi(z_1) e_1(z_1) \prod_{i>1} A_i(z_{i-1}, z_i) e_i(z_i),

where the evidence `e_i` already carries whatever is known or believed of the token at position `i`.
Its three uses: the sum over paths (`forward_filter`, the normaliser), the law of each latent and
joint samples of paths (`posterior`, `sample_backward`), and the best path (`best_path`).

An absent position is no part of the chain: its neighbours are joined as if it were not there.

Numerics: probabilities, not their logarithms, with a rescaling at every step, so that a step is one
matrix product in float32. A row whose mass all but vanishes in a step is computed again in log
space, which cannot underflow. Sources: Rabiner (1989), sections III and V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..context.copies import CopySteps
from ..lazy import cached_property
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
    """A batch of chains; made by [`Chain.start`].

    Attributes:
        steps: the transitions.
        evidence: `[B, L, H]` log-evidence, the initial law included; what absent positions hold is
            ignored.
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
        """A chain that starts with log-potentials `initial`, `[H]` or `[B, L, H]` by position.

        They join the evidence of each row's first present position, so that the recursions can all
        start from the uniform law.
        """
        start = initial + math.log(initial.shape[-1])
        if present is None:
            first = evidence[:, :1] + (start if start.ndim == 1 else start[:, :1])
            return cls(steps, torch.cat((first, evidence[:, 1:]), 1))
        first = present & (present.cumsum(1) == 1)
        return cls(steps, torch.where(first[..., None], evidence + start, evidence), present)

    @property
    def device(self) -> torch.device:
        return self.evidence.device

    @cached_property
    def cannot_underflow(self) -> bool:
        """Can no row need log space?"""
        return self.steps.log_range <= SAFE_RANGE

    @property
    def smallest(self) -> float:
        """Mass up to here counts as lost in a step."""
        return 0.0 if self.cannot_underflow else LOST_MASS

    def divisor(self, scale: torch.Tensor) -> torch.Tensor:
        """What a message is rescaled by: `scale`, or 1 where it is lost."""
        return scale.masked_fill(scale <= self.smallest, 1)

    def select(self, rows: torch.Tensor) -> Chain:
        """The chains of some rows."""
        present = None if self.present is None else self.present[rows]
        return Chain(self.steps.select(rows), self.evidence[rows], present)

    def moves(self, position: int) -> torch.Tensor | None:
        """`[B, 1]` bool: is there a step into `position`? None where there is in all rows."""
        if self.present is None:
            return None
        return self.steps_into[:, position, None]

    @cached_property
    def steps_into(self) -> torch.Tensor:
        """`[B, L]` bool, what `moves` says of all positions; only where some are absent."""
        return self.present & (self.present.cumsum(1) > 1)

    def at(self, position: int) -> torch.Tensor | None:
        """`[B, 1]` bool: is `position` present? None where it is in all rows."""
        return None if self.present is None else self.present[:, position, None]


@dataclass
class Filter:
    """What the forward pass leaves behind.

    Attributes:
        log_partition: `[B]`, log of the sum of `w` over all paths; -inf where it is zero.
        messages: `[B, L, H]`, law of `z_i` given the evidence up to `i`; at an absent position, of
            the last present one before it.
        log_rows: `[n]` rows that had to be computed in log space; None where none can need it.
        log_messages: `[n, L, H]` their messages in log space, unnormalised.
    """

    log_partition: torch.Tensor
    messages: torch.Tensor
    log_rows: torch.Tensor | None = None
    log_messages: torch.Tensor | None = None

    def copy(self, number: int, batch: int) -> Filter:
        """What it says of one of the copies of a batch that were stacked."""
        first = number * batch
        part, rows, log_messages = slice(first, first + batch), self.log_rows, self.log_messages
        if rows is not None:
            kept = (rows >= first) & (rows < first + batch)
            rows = rows[kept] - first
            log_messages = log_messages[kept] if len(rows) else None
        return Filter(self.log_partition[part], self.messages[part], rows, log_messages)


def _where(condition: torch.Tensor | None, value: torch.Tensor, other) -> torch.Tensor:
    return value if condition is None else torch.where(condition, value, other)


@full_precision
def forward_filter(chain: Chain) -> Filter:
    """Runs the scaled forward recursion; differentiable in all potentials."""
    result, lost = _scaled_forward(chain)
    if chain.cannot_underflow:
        return result
    # Each step kept enough mass, but what is rounded to zero early may win late: the past must also
    # meet the future. (The gradient of a message is the future's weight over that same total.)
    with torch.no_grad():
        fragile = lost | _scaled_backward(chain, result.messages)[1]
    result.log_rows = fragile.nonzero()[:, 0]
    if len(result.log_rows):
        rows = (result.log_rows,)
        result.log_messages, log_partition = _log_forward(chain.select(result.log_rows))
        result.log_partition = result.log_partition.index_put(rows, log_partition)
        messages = normalised_exp(result.log_messages)
        result.messages = result.messages.index_put(rows, messages)
    return result


def _scaled_forward(chain: Chain) -> tuple[Filter, torch.Tensor]:
    """The filter in probability space, and which rows `[B]` may have lost mass."""
    evidence, shift = shifted_exp(chain.evidence, 2)
    batch, length, latents = evidence.shape
    by_position = evidence.unbind(1)  # the backward pass of a slice would fill all positions
    message = evidence.new_full((batch, latents), 1 / latents)
    log_scale = _where(chain.present, shift[..., 0], 0).sum(1) + _scale_of_steps(chain)
    messages, scales = [], []
    for i in range(length):
        message, scale = step_right(chain, message, by_position[i], i)
        messages.append(message)
        scales.append(scale)
    scales = torch.cat(scales, 1)
    lost = (scales <= chain.smallest).any(1)
    log_partition = log_scale + safe_log(scales).sum(1)
    return Filter(log_partition, torch.stack(messages, 1)), lost


def _scale_of_steps(chain: Chain) -> torch.Tensor:
    """`[B]` or `[1]`: the log of what all steps leave out."""
    batch, length, _ = chain.evidence.shape
    if chain.present is None:
        return chain.steps.log_scales(length, batch).sum(0)
    return chain.steps.log_scales(length, batch).mul(chain.steps_into[:, 1:].T).sum(0)


def step_right(
    chain: Chain, message: torch.Tensor, weights: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward message of a position, and the scale `[B, 1]` that was taken out of it.

    Args:
        chain: the chain.
        message: `[B, H]` of the position before; at position 0, the uniform law.
        weights: `[B, H]`, the evidence in probability space, up to a factor.
        position: where to.
    """
    predicted = message
    if position > 0:
        predicted = _where(chain.moves(position), chain.steps.forward(message, position), message)
    joint = _where(chain.at(position), predicted * weights, message)
    scale = joint.sum(-1, keepdim=True)
    return joint / chain.divisor(scale), scale


def step_left(
    chain: Chain, future: torch.Tensor, weights: torch.Tensor, position: int
) -> torch.Tensor:
    """`[B, H]`: what `position` and those to its right say of the latent before it, scaled.

    Args:
        chain: the chain.
        future: `[B, H]`, what the positions to the right say of the latent at `position`.
        weights: `[B, H]`, the evidence there in probability space, up to a factor.
        position: where from, not 0.
    """
    past = chain.steps.backward(weights * future, position)
    past = past / chain.divisor(past.amax(-1, keepdim=True))
    return _where(chain.moves(position), past, future)


def _log_forward(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised log-messages `[B, L, H]` and the log-partition `[B]`, in log space."""
    batch, length, latents = chain.evidence.shape
    message = chain.evidence.new_full((batch, latents), -math.log(latents))
    messages = []
    for i in range(length):
        predicted = message
        if i > 0:
            moved = logsumexp(message[:, :, None] + chain.steps.log_matrix(i), 1)
            predicted = _where(chain.moves(i), moved, message)
        message = _where(chain.at(i), predicted + chain.evidence[:, i], message)
        messages.append(message)
    return torch.stack(messages, 1), logsumexp(message, 1)


@full_precision
def posterior(chain: Chain, filtered: Filter) -> torch.Tensor:
    """`[B, L, H]`: the law of each latent given all evidence; zeros at absent positions.

    A backward pass over the filter's messages, in log space where that is needed.
    """
    smoothed, fragile = _scaled_backward(chain, filtered.messages)
    if filtered.log_rows is None:
        return smoothed
    fragile[filtered.log_rows] = True
    rows = fragile.nonzero()[:, 0]
    if len(rows):
        selected = chain.select(rows)
        exact = _log_backward(selected, _log_forward(selected)[0])
        smoothed = smoothed.index_put((rows,), exact)
    return smoothed


def _scaled_backward(chain: Chain, messages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    evidence = shifted_exp(chain.evidence, 2)[0].unbind(1)
    past_laws = messages.unbind(1)
    future = torch.ones_like(past_laws[0])
    fragile = torch.zeros(len(messages), dtype=torch.bool, device=messages.device)
    smoothed = []
    for i in reversed(range(messages.shape[1])):
        joint = past_laws[i] * future
        total = joint.sum(-1, keepdim=True)
        lost = total <= chain.smallest
        fragile = fragile | lost[:, 0]
        smoothed.append(_where(chain.at(i), joint / total.masked_fill(lost, 1), 0))
        if i > 0:
            future = step_left(chain, future, evidence[i], i)
    return torch.stack(smoothed[::-1], 1), fragile


def _log_backward(chain: Chain, log_messages: torch.Tensor) -> torch.Tensor:
    future = torch.zeros_like(log_messages[:, 0])
    smoothed = []
    for i in reversed(range(log_messages.shape[1])):
        law = normalised_exp(log_messages[:, i] + future)
        smoothed.append(_where(chain.at(i), law, 0))
        if i > 0:
            outgoing = (chain.evidence[:, i] + future)[:, None] + chain.steps.log_matrix(i)
            future = _where(chain.moves(i), logsumexp(outgoing, 2), future)
    return torch.stack(smoothed[::-1], 1)


@full_precision
def sample_backward(
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
    samples = int(torch.Size(sample_shape).numel())
    numbers = uniform((batch, samples, length), generator, chain.device)
    numbers = numbers.transpose(0, 1)  # [S, B, L]

    numbers, messages = numbers.unbind(-1), filtered.messages.unbind(1)
    state = draw_categorical(messages[-1].expand(samples, -1, -1), numbers[-1])
    states = [state]
    for i in reversed(range(1, length)):
        # `state` is the latent of the last present position up to i.
        weights = messages[i - 1] * chain.steps.column(state, i)
        if filtered.log_messages is not None:
            rows = filtered.log_rows
            matrix = chain.steps.log_matrix(i, rows).transpose(1, 2).expand(len(rows), -1, -1)
            towards = matrix[torch.arange(len(rows), device=rows.device), state[:, rows]]
            weights[:, rows] = normalised_exp(filtered.log_messages[:, i - 1] + towards)
        drawn = draw_categorical(weights, numbers[i - 1])
        moves = chain.moves(i)
        state = _where(None if moves is None else moves[:, 0], drawn, state)
        states.append(state)
    return torch.stack(states[::-1], -1).reshape(*sample_shape, batch, length)


@full_precision
def best_path(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """The path of largest weight `[B, L]` and its log-weight `[B]` (Viterbi), in log space."""
    batch, length, latents = chain.evidence.shape
    score = chain.evidence.new_full((batch, latents), -math.log(latents))
    score = _where(chain.at(0), score + chain.evidence[:, 0], score)
    stay = torch.arange(latents, device=chain.device).expand(batch, -1)
    origins = []
    for i in range(1, length):
        best, origin = chain.steps.best_into(score, i)
        moves = chain.moves(i)
        origins.append(_where(moves, origin, stay))
        score = _where(moves, best, score)
        score = _where(chain.at(i), score + chain.evidence[:, i], score)
    log_weight, state = score.max(-1)
    path = [state]
    for origin in reversed(origins):
        state = origin.gather(1, state[:, None])[:, 0]
        path.append(state)
    return torch.stack(path[::-1], 1), log_weight
