r"""One recursion over a chain of non-negative potentials.

The object is the unnormalised distribution of a latent path `z_1 ... z_L` over `H` states,

    w(z) = pi(z_1) e_1(z_1) \prod_{i>1} A_i(z_{i-1}, z_i) e_i(z_i),

where the evidence `e_i` carries what is known or believed of the token at position `i`. Messages
pass from neighbour to neighbour. An algebra says what their sums and products are: probabilities,
rescaled at every step, where a step is one matrix product, or logarithms, which cannot underflow.
(A maximum in place of the sum gives the best path.) An absent position is no part of the chain: its
neighbours are joined as if it were not there.

Source: Rabiner (1989), sections III and V.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..random import Generators, draw_categorical, uniform

if TYPE_CHECKING:
    from ..context.maps import CopySteps
    from ..potentials.circuit import StepTransitions

SINGLE_RANGE, DOUBLE_RANGE = 32.0, 320.0
"""Entries of a step within so many nats of the largest are safe in float32, and in float64.

What float32 rounds to zero in a step is then less than `exp(-87 + 32)` of the mass that is kept,
and the future can favour it over what is kept by `exp(32)` at most: the error stays below
`H exp(-23)`. Likewise float64, with `exp(-708 + 320)`. All others are worked on in logarithms.
"""

StepFunction = Callable[[torch.Tensor, int], torch.Tensor]
"""Of messages or states, and a position; gives messages or states."""


def full_precision(function: Callable) -> Callable:
    """Switches autocast off inside, on the `device` of the first argument."""

    @functools.wraps(function)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper


def safe_log(x: torch.Tensor) -> torch.Tensor:
    """Logarithm with `log 0 = -inf` and a zero gradient there."""
    positive = x > 0
    return torch.where(positive, x.masked_fill(~positive, 1).log(), -torch.inf)


def shifted_exp(x: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp(x - shift)` and the `shift`, the maximum over `dim` (0 where that is -inf)."""
    shift = x.detach().amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    difference = x - shift
    in_place = not (torch.is_grad_enabled() and x.requires_grad)
    return difference.exp_() if in_place else difference.exp(), shift


def normalised_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """`softmax` over the last axis that gives zeros, not NaN, where everything is -inf."""
    weights, _ = shifted_exp(log_weights, -1)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total <= 0, 1)


def logsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`logsumexp` whose gradient is zero, not NaN, where everything is -inf."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.logsumexp(dim)  # one fused pass
    weights, shift = shifted_exp(x, dim)
    return safe_log(weights.sum(dim)) + shift.squeeze(dim)


class Filter(NamedTuple):
    """`log Z` `[B]`, -inf where it is zero, and the messages `[B, L, H]`."""

    log_partition: torch.Tensor
    messages: torch.Tensor


@dataclass
class Algebra:
    """Sums and products of messages `[B, H]`: distributions given the evidence up to a position.

    Attributes:
        weights: `L` messages, the evidence.
        log_scale: `[B]`, the log of what evidence and steps leave out.
        times, total: the product of two messages, and the sum `[B, 1]` of one.
        divide: a message divided by a factor `[B, 1]`.
        step, step_back: the message after the step into a position, the weights before it.
        column: the weights `[*S, B, H]` of the latents before states `[*S, B]` at a position.
        probs, logs: the probabilities of a message and their logarithms, up to a factor.
        from_logs: the message of logarithms, up to a factor.
    """

    weights: tuple[torch.Tensor, ...]
    log_scale: torch.Tensor
    times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    total: Callable[[torch.Tensor], torch.Tensor]
    divide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    step: StepFunction
    step_back: StepFunction
    column: StepFunction
    probs: Callable[[torch.Tensor], torch.Tensor]
    logs: Callable[[torch.Tensor], torch.Tensor]
    from_logs: Callable[[torch.Tensor], torch.Tensor]


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

    def started(self, initial: torch.Tensor) -> Chain:
        """With log-potentials `initial`, `[H]` or `[B, L, H]`, of where each row starts."""
        every = torch.arange(self.evidence.shape[1], device=self.device) == 0
        present = self.present
        starts = every if present is None else present & (present.cumsum(1) == 1)
        start = initial + math.log(initial.shape[-1])  # messages start uniform
        evidence = torch.where(starts[..., None], self.evidence + start, self.evidence)
        return replace(self, evidence=evidence)

    def select(self, rows: torch.Tensor) -> Chain:
        """The chains of some rows."""
        present = None if self.present is None else self.present[rows]
        return Chain(self.steps.select(rows), self.evidence[rows], present)

    @property
    def device(self) -> torch.device:
        """Where the evidence is."""
        return self.evidence.device

    @cached_property
    def has_step(self) -> torch.Tensor | None:
        """`[B, L]` bool: is there a step into the position? None where there is in all rows."""
        return None if self.present is None else self.present & (self.present.cumsum(1) > 1)

    @cached_property
    def algebra(self) -> Algebra:
        """Probabilities in the least precision that is safe, or logarithms."""
        log_range, dtype = self.steps.log_range, self.evidence.dtype
        has_double = self.device.type != "mps"
        if log_range > (DOUBLE_RANGE if has_double else SINGLE_RANGE):
            return self._logarithms()
        dtype = dtype if log_range <= SINGLE_RANGE else torch.float64
        steps = self.steps.to(dtype)
        weights, shift = shifted_exp(self.evidence.to(dtype), 2)
        shift, scales = shift[..., 0], steps.log_scales(*reversed(self.evidence.shape[:2]))
        if self.present is not None and self.has_step is not None:
            shift, scales = torch.where(self.present, shift, 0), scales * self.has_step[:, 1:].T
        return Algebra(
            weights=weights.unbind(1),  # the backward pass of a slice would fill all positions
            log_scale=shift.sum(1) + scales.sum(0),
            times=torch.mul,
            total=lambda x: x.sum(-1, keepdim=True),
            divide=lambda x, total: x / total.masked_fill(total <= 0, 1),
            step=steps.forward,
            step_back=steps.backward,
            column=steps.column,
            probs=lambda x: x,
            logs=safe_log,
            from_logs=lambda x: shifted_exp(x.to(dtype), -1)[0],
        )

    def _logarithms(self) -> Algebra:
        steps = self.steps

        def step(message: torch.Tensor, i: int) -> torch.Tensor:
            matrix = steps.log_matrix(i)  # of one row, or of each in several copies of the batch
            message = message.unflatten(0, (-1, len(matrix)))
            return logsumexp(message[..., None] + matrix, -2).flatten(0, 1)

        def step_back(weights: torch.Tensor, i: int) -> torch.Tensor:
            matrix = steps.log_matrix(i)
            weights = weights.unflatten(0, (-1, len(matrix)))
            return logsumexp(weights[..., None, :] + matrix, -1).flatten(0, 1)

        def column(state: torch.Tensor, i: int) -> torch.Tensor:
            matrix = steps.log_matrix(i).expand(state.shape[-1], -1, -1)
            return matrix.transpose(1, 2)[torch.arange(len(matrix), device=state.device), state]

        return Algebra(
            weights=self.evidence.unbind(1),
            log_scale=self.evidence.new_zeros(len(self.evidence)),
            times=torch.add,
            total=lambda x: logsumexp(x, -1)[..., None],
            divide=lambda x, total: x - total.masked_fill(total == -torch.inf, 0),
            step=step,
            step_back=step_back,
            column=column,
            probs=normalised_exp,
            logs=lambda x: x,
            from_logs=lambda x: x,
        )

    @property
    def one(self) -> torch.Tensor:
        """`[B, H]`, the message that changes nothing."""
        return self.algebra.from_logs(torch.zeros_like(self.evidence[:, 0]))

    def _arriving(self, message: torch.Tensor | None, i: int) -> torch.Tensor:
        """The message that arrives at a position from the one before; from none it is uniform."""
        if message is None:
            return self.algebra.divide(self.one, self.algebra.total(self.one))
        return _where(self.has_step, i, self.algebra.step(message, i), message)

    def forward(
        self, first: int = 0, last: int | None = None, message: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the messages of positions `first` to `last`, and the totals taken out of them."""
        algebra, weights = self.algebra, self.algebra.weights
        for i in range(first, len(weights) if last is None else last + 1):
            message = self._arriving(message, i)
            message = _where(self.present, i, algebra.times(message, weights[i]), message)
            total = algebra.total(message)
            message = algebra.divide(message, total)
            yield message, total

    def backward(
        self, first: int = 0, last: int | None = None, future: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Yields the messages from all positions to the right, from `last` down to `first`.

        The one at `last` is `future`.
        """
        algebra, weights = self.algebra, self.algebra.weights
        future = self.one if future is None else future
        for i in range(len(weights) - 1 if last is None else last, first - 1, -1):
            yield future
            if i > first:
                earlier = algebra.step_back(algebra.times(weights[i], future), i)
                earlier = algebra.divide(earlier, earlier.amax(-1, keepdim=True))
                future = _where(self.has_step, i, earlier, future)

    def _trace(self, state: torch.Tensor, before: StepFunction) -> torch.Tensor:
        """The paths `[*S, B, L]` that end in `state` `[*S, B]`; `before` says where from."""
        path, has_step = [state], self.has_step
        for i in range(self.evidence.shape[1] - 1, 0, -1):
            origin = before(state, i)
            state = origin if has_step is None else torch.where(has_step[:, i], origin, state)
            path.append(state)
        return torch.stack(path[::-1], -1)

    @full_precision
    def filter(self) -> Filter:
        """The sum over all paths; differentiable in all potentials."""
        messages, totals = zip(*self.forward(), strict=True)
        log_total = self.algebra.logs(torch.cat(totals, 1)).sum(1)
        log_partition = (self.algebra.log_scale + log_total).to(self.evidence.dtype)
        return Filter(log_partition, torch.stack(messages, 1))

    def probs(self, message: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """`[..., H]`: the distribution of a latent, of past and future; zeros if impossible."""
        joint = self.algebra.times(message, future)
        probs = self.algebra.probs(self.algebra.divide(joint, self.algebra.total(joint)))
        return probs.to(self.evidence.dtype)

    @full_precision
    def posterior(self, messages: torch.Tensor) -> torch.Tensor:
        """`[B, L, H]`: the distribution of each latent given all evidence; zeros at absent ones."""
        probs, pasts = [], messages.unbind(1)
        for i, future in zip(range(len(pasts) - 1, -1, -1), self.backward(), strict=True):
            probs.append(_where(self.present, i, self.probs(pasts[i], future), 0))
        return torch.stack(probs[::-1], 1)

    @full_precision
    def sample(
        self, messages: torch.Tensor, shape: tuple[int, ...] = (), generator: Generators = None
    ) -> torch.Tensor:
        """Joint samples of latent paths, `[*shape, B, L]`, from the last position back.

        What stands at absent positions has no meaning. One uniform number is used per row, sample
        and position, whatever is present.
        """
        algebra, (batch, length, _) = self.algebra, messages.shape
        numbers = uniform((batch, math.prod(shape), length), generator, self.device)
        by_position, pasts = numbers.transpose(0, 1).unbind(-1), messages.unbind(1)

        def before(state: torch.Tensor, i: int) -> torch.Tensor:
            weights = algebra.times(pasts[i - 1], algebra.column(state, i))
            return draw_categorical(algebra.probs(weights), by_position[i - 1])

        ends = algebra.probs(pasts[-1]).expand(len(by_position[-1]), -1, -1)
        paths = self._trace(draw_categorical(ends, by_position[-1]), before)
        return paths.reshape(*shape, batch, length)

    @full_precision
    def likely_path(self, messages: torch.Tensor) -> torch.Tensor:
        """The path `[B, L]` of `sample` with the most probable state in place of every draw."""
        pasts, algebra = messages.unbind(1), self.algebra

        def before(state: torch.Tensor, i: int) -> torch.Tensor:
            return algebra.times(pasts[i - 1], algebra.column(state[None], i)[0]).argmax(-1)

        return self._trace(pasts[-1].argmax(-1), before)

    @full_precision
    def best_path(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The path of largest weight `[B, L]` and its log-weight `[B]` (Viterbi)."""
        origins = {}

        def step(message: torch.Tensor, i: int) -> torch.Tensor:
            best, origins[i] = (message[:, :, None] + self.steps.log_matrix(i)).max(1)
            return best

        def before(state: torch.Tensor, i: int) -> torch.Tensor:
            return origins[i].gather(1, state[:, None])[:, 0]

        def largest(message: torch.Tensor) -> torch.Tensor:
            return message.amax(-1, keepdim=True)

        best, size = replace(self), self.evidence.shape[-1]
        best.algebra = replace(self._logarithms(), total=largest, step=step)
        log_weight, messages = best.filter()
        # Messages start uniform, and a maximum does not add the states up again.
        return self._trace(messages[:, -1].argmax(-1), before), log_weight - math.log(size)


def _where(
    rows: torch.Tensor | None, i: int, value: torch.Tensor, other: torch.Tensor | float
) -> torch.Tensor:
    """`[B, H]`: `value` where `rows` `[B, L]` hold at position `i`, or everywhere if None."""
    return value if rows is None else torch.where(rows[:, i, None], value, other)
