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

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .random import Generators, draw_categorical, uniform

LOST_MASS = 1e-12
"""A row is repeated in log space when one rescaled step leaves it less mass than this."""


@dataclass
class Chain:
    """A batch of chains.

    Attributes:
        initial: `[H]` log-potentials of the first latent.
        transition: `[1, H, H]` (shared by all steps) or `[L-1, H, H]` log-potentials, row =
            previous state; entry `i-1` leads into position `i`.
        evidence: `[B, L, H]` log-evidence; what absent positions hold is ignored.
        present: `[B, L]` bool.
    """

    initial: torch.Tensor
    transition: torch.Tensor
    evidence: torch.Tensor
    present: torch.Tensor

    def step(self, position: int) -> int:
        """Index into the first axis of `transition` of the step into `position`."""
        return min(position - 1, self.transition.shape[0] - 1)

    def select(self, rows: torch.Tensor) -> Chain:
        """The chains of some rows."""
        return Chain(self.initial, self.transition, self.evidence[rows], self.present[rows])


@dataclass
class Filter:
    """What the forward pass leaves behind.

    Attributes:
        log_partition: `[B]`, log of the sum of `w` over all paths; -inf where it is zero.
        messages: `[B, L, H]`, law of `z_i` given the evidence up to `i`; at an absent position, of
            the last present one before it.
        log_messages: the same in log space for the rows of `log_rows`, where it had to be used.
        log_rows: `[n]` rows.
    """

    log_partition: torch.Tensor
    messages: torch.Tensor
    log_rows: torch.Tensor
    log_messages: torch.Tensor | None


def full_precision(function: Callable) -> Callable:
    """Switches autocast off inside: products of probabilities are not for half precision.

    The first argument must have a tensor `initial`.
    """

    @functools.wraps(function)
    def wrapper(first, *args, **kwargs):
        with torch.autocast(first.initial.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper


def safe_log(x: torch.Tensor) -> torch.Tensor:
    """Logarithm with `log 0 = -inf` and a zero gradient there."""
    positive = x > 0
    return torch.where(positive, x.masked_fill(~positive, 1).log(), -torch.inf)


def _shifted_exp(x: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp(x - shift)` and the `shift`, the maximum over `dim` (0 where that is -inf)."""
    shift = x.detach().amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    return (x - shift).exp(), shift


def _first_present(present: torch.Tensor) -> torch.Tensor:
    """`[B, L]`: True up to and including the first present position."""
    return (present.cumsum(1) - present.long()) == 0


@full_precision
def forward_filter(chain: Chain) -> Filter:
    """Runs the scaled forward recursion; differentiable in all potentials."""
    batch, length, _ = chain.evidence.shape
    initial, initial_shift = _shifted_exp(chain.initial, 0)
    transition, transition_shift = _shifted_exp(chain.transition, (1, 2))
    evidence, evidence_shift = _shifted_exp(chain.evidence, 2)
    fresh = _first_present(chain.present)

    message = initial.expand(batch, -1)
    log_partition = initial_shift.expand(batch)
    fragile = torch.zeros(batch, dtype=torch.bool, device=message.device)
    messages = []
    for i in range(length):
        present = chain.present[:, i, None]
        predicted = message
        if i > 0:
            step = chain.step(i)
            predicted = torch.where(fresh[:, i, None], message, message @ transition[step])
        joint = torch.where(present, predicted * evidence[:, i], message)
        scale = joint.sum(-1, keepdim=True)
        if i > 0:
            moved = present & ~fresh[:, i, None]
            log_partition = log_partition + moved[:, 0] * transition_shift[step].reshape(())
        log_partition = log_partition + present[:, 0] * evidence_shift[:, i, 0]
        lost = scale <= LOST_MASS
        fragile = fragile | lost[:, 0]
        scale = scale.masked_fill(lost, 1)
        message = joint / scale
        log_partition = log_partition + scale[:, 0].log()
        messages.append(message)

    # Each step kept enough mass, but what is rounded to zero early may win late: the past must also
    # meet the future. (The gradient of a message is the future's weight over that same total.)
    with torch.no_grad():
        fragile = fragile | _backward(chain, torch.stack(messages, 1))[1]
    result = Filter(log_partition, torch.stack(messages, 1), fragile.nonzero()[:, 0], None)
    if len(result.log_rows):
        log_messages, log_partition = _log_forward(chain.select(result.log_rows))
        rows = (result.log_rows,)
        result.log_messages = log_messages
        result.log_partition = result.log_partition.index_put(rows, log_partition)
        result.messages = result.messages.index_put(rows, normalised_exp(log_messages))
    return result


def normalised_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """`softmax` over the last axis that gives zeros, not NaN, where everything is -inf."""
    weights, _ = _shifted_exp(log_weights, -1)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total <= 0, 1)


def logsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`logsumexp` whose gradient is zero, not NaN, where everything is -inf."""
    weights, shift = _shifted_exp(x, dim)
    return safe_log(weights.sum(dim)) + shift.squeeze(dim)


def _log_forward(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised log-messages `[B, L, H]` and the log-partition `[B]`, in log space."""
    fresh = _first_present(chain.present)
    message = chain.initial.expand(chain.evidence.shape[0], -1)
    messages = []
    for i in range(chain.evidence.shape[1]):
        predicted = message
        if i > 0:
            moved = logsumexp(message[:, :, None] + chain.transition[chain.step(i)], 1)
            predicted = torch.where(fresh[:, i, None], message, moved)
        message = torch.where(chain.present[:, i, None], predicted + chain.evidence[:, i], message)
        messages.append(message)
    return torch.stack(messages, 1), logsumexp(message, 1)


@full_precision
def posterior(chain: Chain, filtered: Filter) -> torch.Tensor:
    """`[B, L, H]`: the law of each latent given all evidence; zeros at absent positions.

    A backward pass over the filter's messages, in log space where that is needed.
    """
    smoothed, fragile = _backward(chain, filtered.messages)
    fragile[filtered.log_rows] = True
    rows = fragile.nonzero()[:, 0]
    if len(rows):
        selected = chain.select(rows)
        exact = _log_backward(selected, _log_forward(selected)[0])
        smoothed = smoothed.index_put((rows,), exact)
    return smoothed


def _backward(chain: Chain, messages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    transition, _ = _shifted_exp(chain.transition, (1, 2))
    evidence, _ = _shifted_exp(chain.evidence, 2)
    fresh = _first_present(chain.present)
    future = torch.ones_like(messages[:, 0])
    fragile = torch.zeros_like(chain.present[:, 0])
    smoothed = []
    for i in reversed(range(messages.shape[1])):
        present = chain.present[:, i, None]
        joint = messages[:, i] * future
        total = joint.sum(-1, keepdim=True)
        lost = total <= LOST_MASS
        fragile = fragile | lost[:, 0]
        smoothed.append(torch.where(present, joint / total.masked_fill(lost, 1), 0))
        if i > 0:
            past = (evidence[:, i] * future) @ transition[chain.step(i)].T
            largest = past.amax(-1, keepdim=True)
            past = past / largest.masked_fill(largest <= LOST_MASS, 1)
            future = torch.where(present & ~fresh[:, i, None], past, future)
    return torch.stack(smoothed[::-1], 1), fragile


def _log_backward(chain: Chain, log_messages: torch.Tensor) -> torch.Tensor:
    fresh = _first_present(chain.present)
    future = torch.zeros_like(log_messages[:, 0])
    smoothed = []
    for i in reversed(range(log_messages.shape[1])):
        present = chain.present[:, i, None]
        law = normalised_exp(log_messages[:, i] + future)
        smoothed.append(torch.where(present, law, 0))
        if i > 0:
            outgoing = (chain.evidence[:, i] + future)[:, None] + chain.transition[chain.step(i)]
            future = torch.where(present & ~fresh[:, i, None], logsumexp(outgoing, 2), future)
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
    numbers = uniform((batch, samples, length), generator, chain.evidence.device)
    numbers = numbers.transpose(0, 1)  # [S, B, L]
    transition, _ = _shifted_exp(chain.transition, (1, 2))
    fresh = _first_present(chain.present)

    weights = filtered.messages[:, -1].expand(samples, -1, -1)
    state = draw_categorical(_or_ones(weights), numbers[..., -1])
    states = [state]
    for i in reversed(range(1, length)):
        # `state` is the latent of the last present position up to i.
        step = chain.step(i)
        weights = filtered.messages[:, i - 1] * transition[step].T[state]
        if len(filtered.log_rows):
            rows = filtered.log_rows
            towards = chain.transition[step].T[state[:, rows]]
            weights[:, rows] = normalised_exp(filtered.log_messages[:, i - 1] + towards)
        drawn = draw_categorical(_or_ones(weights), numbers[..., i - 1])
        moves = chain.present[:, i] & ~fresh[:, i]
        state = torch.where(moves, drawn, state)
        states.append(state)
    return torch.stack(states[::-1], -1).reshape(*sample_shape, batch, length)


def _or_ones(weights: torch.Tensor) -> torch.Tensor:
    """Weights, or ones where all are zero (a row without any possible path)."""
    return torch.where((weights.sum(-1, keepdim=True) > 0), weights, 1)


@full_precision
def best_path(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """The path of largest weight `[B, L]` and its log-weight `[B]` (Viterbi), in log space."""
    batch, length, _ = chain.evidence.shape
    fresh = _first_present(chain.present)
    score = chain.initial.expand(batch, -1)
    score = torch.where(chain.present[:, :1], score + chain.evidence[:, 0], score)
    origins = []
    for i in range(1, length):
        best, origin = (score[:, :, None] + chain.transition[chain.step(i)]).max(1)
        moves = (chain.present[:, i] & ~fresh[:, i])[:, None]
        stay = torch.arange(score.shape[1], device=score.device).expand_as(origin)
        origins.append(torch.where(moves, origin, stay))
        score = torch.where(moves, best, score)
        score = torch.where(chain.present[:, i, None], score + chain.evidence[:, i], score)
    log_weight, state = score.max(-1)
    path = [state]
    for origin in reversed(origins):
        state = origin.gather(1, state[:, None])[:, 0]
        path.append(state)
    return torch.stack(path[::-1], 1), log_weight
