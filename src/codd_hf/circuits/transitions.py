r"""How latents follow one another: the transition potentials and what the context does to them.

A chain asks four things of its transitions `A_i(z, z')`, the potential of the step into position
`i`: `push` (row vector times matrix), `pull` (matrix times column vector), `into` (a column, for
backward sampling), and `log_matrix` (all of it, in log space, where those would underflow and for
the best path). Two structures answer them, dense and Monarch; context may rescale either between
groups of states (a gate) and add a matrix of low rank.

    A_i(z, z') = A(z, z') exp(gate_i[group(z), group(z')]) + \sum_r a_{i,r}(z) b_{i,r}(z')

Sources: Monarch matrices, Dao et al. (arXiv 2204.00595); CoDD, arXiv 2603.00045, Appendix E, for
context in general.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .lazy import cached_property
from .numerics import logsumexp, product, shifted_exp


@dataclass(frozen=True)
class DenseTransition:
    """Log-potentials `[1, H, H]` (shared by all steps) or `[L-1, H, H]`, row = previous state."""

    log_potential: torch.Tensor

    @property
    def num_steps(self) -> int:
        return self.log_potential.shape[0]

    @property
    def num_latents(self) -> int:
        return self.log_potential.shape[-1]

    def to(self, dtype: torch.dtype) -> DenseTransition:
        same = self.log_potential.dtype == dtype
        return self if same else DenseTransition(self.log_potential.to(dtype))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The log-potentials that make up the structure."""
        return (self.log_potential,)

    @cached_property
    def factors(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The matrices in probability space, the largest entry 1, and the log of their scale.

        In memory by next state, which is what few vectors are pushed through the fastest.
        """
        matrix, shift = shifted_exp(self.log_potential, (1, 2))
        return (matrix.mT.contiguous().mT,), shift[:, 0, 0]

    @cached_property
    def spread(self) -> float:
        """Largest minus smallest log-potential, in nats; infinite where one is zero."""
        return _spread(self.log_potential)

    @cached_property
    def smallest(self) -> float:
        """The smallest log-potential."""
        return float(self.log_potential.detach().min())

    @cached_property
    def row_sums(self) -> tuple[float, float]:
        """The logs of the smallest and the largest sum of a row."""
        return _extremes(self.log_potential.detach().logsumexp(-1))

    @staticmethod
    def push(factors, step: int, message: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        matrix = factors[0][step]
        if gate is None:
            return product(message, matrix)
        groups = gate.shape[-1]
        parts = message.unflatten(-1, (groups, -1)).transpose(0, 1)  # [G, N, H / G]
        moved = parts @ matrix.unflatten(0, (groups, -1))  # [G, N, H]
        moved = moved.unflatten(-1, (groups, -1)).transpose(0, 1)  # [N, G, G, H / G]
        return (moved * gate[..., None]).sum(1).flatten(-2)

    @staticmethod
    def pull(factors, step: int, weights: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        if gate is not None:
            gate = gate.transpose(-1, -2)
        return DenseTransition.push((factors[0].transpose(1, 2),), step, weights, gate)

    @staticmethod
    def into(factors, step: int, state: torch.Tensor) -> torch.Tensor:
        """`A(., state)`, `[..., H]`."""
        return factors[0][step].T[state]

    def log_matrix(self, step: int) -> torch.Tensor:
        """`[H, H]`."""
        return self.log_potential[step]

    def dense(self) -> torch.Tensor:
        """`[steps, H, H]` log-potentials."""
        return self.log_potential


@dataclass(frozen=True)
class MonarchTransition:
    r"""A step of `2 H^{3/2}` products instead of `H^2`.

    States are pairs: `z = (a, b)` with `a, b < sqrt(H)`, `z = a sqrt(H) + b`. A step goes
    `(a, b) -> (a, d) -> (c, d)`: first the second half of the pair changes, given the first; then
    the first half, given the new second.

        A[(a, b), (c, d)] = left[a, b, d] right[d, a, c]

    Attributes:
        left: `[steps, S, S, S]` log-potentials, `S = sqrt(H)`, indexed `[a, b, d]`.
        right: the same, indexed `[d, a, c]`.
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def num_steps(self) -> int:
        return self.left.shape[0]

    @property
    def num_latents(self) -> int:
        return self.left.shape[-1] ** 2

    @classmethod
    def from_dense(cls, log_potential: torch.Tensor) -> MonarchTransition:
        """The closest law of the same steps: `p(d | a, b)` and `p(c | a, d)` of `[steps, H, H]`.

        Rows are taken as equally frequent; the size `H` must be a square.
        """
        side = math.isqrt(log_potential.shape[-1])
        law = log_potential.softmax(-1).unflatten(1, (side, side)).unflatten(3, (side, side))
        left = law.sum(3)  # [steps, a, b, d]
        right = law.sum(2).permute(0, 3, 1, 2)  # [steps, d, a, c]
        return cls(left.log(), (right / right.sum(-1, keepdim=True).clamp(min=1e-30)).log())

    def to(self, dtype: torch.dtype) -> MonarchTransition:
        same = self.left.dtype == dtype
        return self if same else MonarchTransition(self.left.to(dtype), self.right.to(dtype))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The log-potentials that make up the structure."""
        return self.left, self.right

    @cached_property
    def factors(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The two factors in probability space, the largest entry 1, and the log of the scale."""
        left, left_shift = shifted_exp(self.left, (1, 2, 3))
        right, right_shift = shifted_exp(self.right, (1, 2, 3))
        return (left, right), (left_shift + right_shift)[:, 0, 0, 0]

    @cached_property
    def spread(self) -> float:
        """A bound on the largest minus the smallest log-potential, in nats."""
        return _spread(self.left) + _spread(self.right)

    @cached_property
    def smallest(self) -> float:
        """A bound on the smallest log-potential."""
        return float(self.left.detach().min() + self.right.detach().min())

    @cached_property
    def row_sums(self) -> tuple[float, float]:
        """Bounds on the logs of the smallest and the largest sum of a row."""
        parts = [_extremes(t.detach().logsumexp(-1)) for t in self.tensors()]
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]

    @staticmethod
    def push(factors, step: int, message: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        left, right = factors[0][step], factors[1][step]
        size = left.shape[0]
        inner = message.unflatten(-1, (size, size)).transpose(0, 1) @ left  # [a, N, d]
        inner = inner.permute(2, 1, 0).contiguous()  # [d, N, a]; strided, the product is slower
        if gate is None:
            return (inner @ right).permute(1, 2, 0).flatten(-2)  # [N, (c, d)]
        groups = gate.shape[-1]
        parts = inner.unflatten(-1, (groups, -1)).permute(0, 2, 1, 3)  # [d, G, N, a / G]
        moved = parts @ right.unflatten(1, (groups, -1))  # [d, G, N, c]
        moved = moved.unflatten(-1, (groups, -1)).permute(2, 1, 3, 4, 0)  # [N, G, G, c / G, d]
        return (moved * gate[..., None, None]).sum(1).flatten(-3)

    @staticmethod
    def pull(factors, step: int, weights: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        left, right = factors[0][step], factors[1][step]
        size = left.shape[0]
        back = right.transpose(1, 2)  # [d, c, a]
        inner = weights.unflatten(-1, (size, size)).permute(2, 0, 1).contiguous()  # [d, N, c]
        if gate is None:
            inner = inner @ back  # [d, N, a]
        else:
            groups = gate.shape[-1]
            parts = inner.unflatten(-1, (groups, -1)).permute(0, 2, 1, 3)
            moved = parts @ back.unflatten(1, (groups, -1))  # [d, G', N, a]
            moved = moved.unflatten(-1, (groups, -1))  # [d, G', N, G, a / G]
            moved = moved * gate.permute(2, 0, 1)[None, ..., None]
            inner = moved.sum(1).flatten(-2)
        inner = inner.permute(2, 1, 0).contiguous()  # [a, N, d]
        return (inner @ left.transpose(1, 2)).transpose(0, 1).flatten(-2)  # [N, (a, b)]

    @staticmethod
    def into(factors, step: int, state: torch.Tensor) -> torch.Tensor:
        left, right = factors[0][step], factors[1][step]
        size = left.shape[0]
        first = state.div(size, rounding_mode="floor")
        second = state % size
        onto = left.permute(2, 0, 1)[second]  # [..., a, b]
        return (onto * right[second, :, first][..., None]).flatten(-2)

    def log_matrix(self, step: int) -> torch.Tensor:
        left, right = self.left[step], self.right[step]
        # [a, b, d] and [d, a, c] to [a, b, c, d]
        full = left[:, :, None, :] + right.permute(1, 2, 0)[:, None]
        return full.flatten(2).flatten(0, 1)

    def dense(self) -> torch.Tensor:
        return torch.stack([self.log_matrix(step) for step in range(self.num_steps)])


Transition = DenseTransition | MonarchTransition


def _spread(x: torch.Tensor) -> float:
    low, high = _extremes(x.detach())
    return high - low if high - low == high - low else float("inf")


def _extremes(x: torch.Tensor) -> tuple[float, float]:
    low, high = x.aminmax()
    return float(low), float(high)


@dataclass(frozen=True)
class StepContext:
    """What the context does to the transitions of a batch; entry `i` acts on the step into `i`.

    Attributes:
        gate: `[B, L, G, G]` log-factors between groups of states (equal stretches of them, in
            order), row = group of the previous state.
        low_rank: `log a [B, L, r, H]` (previous state) and `log b [B, L, r, H]` (next state).
        gate_limit: a number that no `abs(gate)` exceeds, if one is known (else it is looked up).
        low_rank_limit: likewise for `log a + log b`.
    """

    gate: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    gate_limit: float | None = None
    low_rank_limit: float | None = None

    def map(self, function) -> StepContext:
        """The same with `function` applied to every tensor."""
        return StepContext(
            None if self.gate is None else function(self.gate),
            None if self.low_rank is None else tuple(function(t) for t in self.low_rank),
            self.gate_limit,
            self.low_rank_limit,
        )


class Steps:
    """The transitions of a batch of chains, ready for use in probability space.

    A batch of `B` rows of context serves any number of stacked copies of the batch: vectors
    `[S * B, H]`, copy by copy.

    Args:
        transition: the structure.
        context: what rescales it.
    """

    def __init__(self, transition: Transition, context: StepContext | None = None):
        self.transition = transition
        self.context = context or StepContext()
        self.factors, scale = transition.factors
        scale = scale[:, None]  # [steps, 1]
        context = self.context
        self.gate = self.added = None
        self.share = None
        parts = (context.gate, *(context.low_rank or ()))
        lengths = [part.shape[1] for part in parts if part is not None]
        self.by_position = bool(lengths)
        self.batch = next((len(part) for part in parts if part is not None), 1)
        if self.by_position:
            scale = scale[[self.step(i) for i in range(lengths[0])]]  # [L, 1]
        if context.gate is not None:
            self.gate, shift = shifted_exp(context.gate, (2, 3))
            scale = scale + shift[:, :, 0, 0].T  # [L, B]
        if context.low_rank is not None:
            (before, shift_a), (after, shift_b) = (shifted_exp(t, (2, 3)) for t in context.low_rank)
            self.low_rank_scale = (shift_a + shift_b)[:, :, 0, 0].T  # [L, B]
            # Both terms in units of the larger one.
            total = torch.maximum(scale, self.low_rank_scale)
            self.share = (scale - total).exp()  # [L, B], of the structure itself
            self.added = (before * (self.low_rank_scale - total).exp().T[..., None, None], after)
            scale = total
        self.scale = scale
        # By position, since the backward pass of a slice would fill the other positions with zeros.
        if self.gate is not None:
            self.gate = self.gate.unbind(1)
        if self.added is not None:
            self.added = tuple(part.unbind(1) for part in self.added)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Bounds on the logs of the smallest and the largest entry of a step."""
        smallest = self.transition.smallest
        largest = smallest + self.transition.spread
        if self.context.gate is not None:
            smallest, largest = smallest - self._gate_limit, largest + self._gate_limit
        # What is added can only raise the smallest entry; it may raise the largest.
        return smallest, max(largest, self._added_limit) + self._added_slack

    @cached_property
    def row_sums(self) -> tuple[float, float]:
        """Bounds on the logs of the smallest and the largest sum of a row of a step."""
        smallest, largest = self.transition.row_sums
        if self.context.gate is not None:
            smallest, largest = smallest - self._gate_limit, largest + self._gate_limit
        added = self._added_limit + math.log(self.transition.num_latents)
        return smallest, max(largest, added) + self._added_slack

    @cached_property
    def spread(self) -> float:
        """A bound on how far the entries of a step are apart, in nats."""
        smallest, largest = self.bounds
        return largest - smallest if smallest > -math.inf else math.inf

    @cached_property
    def _gate_limit(self) -> float:
        limit = self.context.gate_limit
        return float(self.context.gate.detach().abs().max()) if limit is None else limit

    @cached_property
    def _added_limit(self) -> float:
        """A bound on the log of an entry of the low-rank term."""
        if self.context.low_rank is None:
            return -math.inf
        limit = self.context.low_rank_limit
        if limit is None:
            # Not of the term itself: one that is zero throughout still sets the scale.
            limit = float(self.low_rank_scale.detach().max())
        return limit + math.log(self.context.low_rank[0].shape[2])

    @property
    def _added_slack(self) -> float:
        """The sum of two terms is at most twice the larger one."""
        return 0.0 if self.context.low_rank is None else math.log(2)

    def step(self, position: int) -> int:
        """Index into the stored steps of the one that leads into `position`."""
        return min(max(position - 1, 0), self.transition.num_steps - 1)

    def _gate(self, position: int, batch: int) -> torch.Tensor | None:
        if self.gate is None:
            return None
        gate = self.gate[position]
        return gate if len(gate) == batch else gate.repeat(batch // len(gate), 1, 1)

    def log_scales(self, length: int, batch: int) -> torch.Tensor:
        """`[length - 1, batch or 1]`: the logs of what the steps into positions 1 ... leave out."""
        if self.by_position:
            scale = self.scale[1:]
        elif len(self.scale) == 1:
            scale = self.scale.expand(length - 1, -1)
        else:
            scale = self.scale[[self.step(i) for i in range(1, length)]]
        return scale if scale.shape[1] in (1, batch) else scale.repeat(1, batch // scale.shape[1])

    def push(self, message: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z message(z) A(z, .)`, `[B, H]`, up to the scale."""
        step = self.step(position)
        moved = self.transition.push(
            self.factors, step, message, self._gate(position, len(message))
        )
        return self._plus(moved, message, position, 0)

    def pull(self, weights: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z' A(., z') weights(z')`, `[B, H]`, up to the scale."""
        step = self.step(position)
        moved = self.transition.pull(
            self.factors, step, weights, self._gate(position, len(weights))
        )
        return self._plus(moved, weights, position, 1)

    def _plus(self, moved, vector, position: int, side: int) -> torch.Tensor:
        """`moved` with what context adds to it; `side` 0 goes forwards, 1 backwards."""
        if self.added is None:
            return moved
        # Copies of the batch side by side, so that each row's context is read once for all.
        copies = vector.unflatten(0, (-1, self.batch)).transpose(0, 1)  # [B, S, H]
        moved = moved.unflatten(0, (-1, self.batch)) * self.share[position][:, None]  # [S, B, H]
        near, far = self.added[side][position], self.added[1 - side][position]
        moved = moved + ((copies @ near.transpose(1, 2)) @ far).transpose(0, 1)
        return moved.flatten(0, 1)

    def into(self, state: torch.Tensor, position: int) -> torch.Tensor:
        """`A(., state)`, `[S, B, H]`, up to the scale, of states `[S, B]`."""
        column = self.transition.into(self.factors, self.step(position), state)
        if self.by_position:
            rows = torch.arange(state.shape[-1], device=state.device)
        if self.gate is not None:
            gate = self.gate[position]  # [B, G, G]
            size = self.transition.num_latents // gate.shape[-1]
            factor = gate.transpose(1, 2)[rows, state.div(size, rounding_mode="floor")]
            column = column * factor.repeat_interleave(size, -1)
        if self.added is not None:
            before, after = (part[position] for part in self.added)  # [B, r, H]
            share = after.transpose(1, 2)[rows, state]  # [S, B, r]
            column = column * self.share[position][:, None]
            column = column + torch.einsum("sbr,brz->sbz", share, before)
        return column

    def log_matrix(self, position: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """`[1, H, H]`, or `[n, H, H]` for `rows` where there is context; exact in log space."""
        matrix = self.transition.log_matrix(self.step(position))[None]
        context = self.context if rows is None else self.context.map(lambda t: t[rows])
        if context.gate is not None:
            size = matrix.shape[-1] // context.gate.shape[-1]
            gate = context.gate[:, position]
            matrix = matrix + gate.repeat_interleave(size, 1).repeat_interleave(size, 2)
        if context.low_rank is not None:
            before, after = (t[:, position] for t in context.low_rank)
            matrix = _log_plus_outer(matrix, before, after)
        return matrix

    def best_into(self, score: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`max_z score(z) + log A(z, .)` and where from, both `[B, H]`, of scores `[B, H]`."""
        return (score[:, :, None] + self.log_matrix(position)).max(1)

    def select(self, rows: torch.Tensor) -> Steps:
        """The transitions of some rows (of stacked copies of the batch)."""
        return Steps(self.transition, self.context.map(lambda t: t[rows % self.batch]))


def _log_plus_outer(
    matrix: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """`log(exp matrix + sum_r exp(before_r) exp(after_r)^T)`, `[n, H, H]`, one term at a time."""
    for r in range(before.shape[1]):
        extra = before[:, r, :, None] + after[:, r, None]
        matrix = logsumexp(torch.stack((matrix.expand_as(extra), extra)), 0)
    return matrix
