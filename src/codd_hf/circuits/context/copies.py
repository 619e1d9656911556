r"""Copy states: further latents, each of which emits one token that was seen before the window.

A state of the circuit stands for a cluster of tokens; names and numbers of this text are more than
that. So the chain gets `J` more states, one for each token `x_j` before the window, in order. State
`j` emits `x_j` and nothing else, with potential `e_j`. Otherwise it behaves as the states that
`x_j` suggests, except that the next copy state may follow it directly:

    A'(z, z') = A(z, z')
    A'(z, j)  = start_{ij} \sum_z' A(z, z') m_j(z')               into copying
    A'(j, s)  = \sum_z l_j(z) A'(z, s) + follow_{is} [s = j + 1]  out of it, or on

with `m_j(z) = p(x_j | z)`, `l_j(z) = p(z | x_j)` and weights that the context gives at every
position `i`. A step costs `O(H J)` more. Pointer networks (arXiv 1506.03134) copy in this way; here
copying is a part of the latent path, which is summed over exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..numerics import logsumexp, safe_log
from ..potentials.transitions import StepTransitions


@dataclass(frozen=True)
class CopyStates:
    """The copy states of a batch; all but `tokens` are log-potentials.

    Attributes:
        tokens: `[B, J]`, what they emit.
        start: `[B, L, J]`, of beginning to copy there, at every position.
        follow: `[B, L, J]`, of coming from the copy state before; entry `j = 0` has no meaning.
        emitted: `[B, J, H]`, `log m_j(z)`, at most 0.
        left: `[B, J, H]`, `log l_j(z)`, at most 0.
        weight: `[B, J]`, `log e_j`.
        limits: if known, a number that no `start + emitted` is below (where there is a token) and
            one that neither it nor `follow` is above; they count if every `l_j` adds up to 1.
    """

    tokens: torch.Tensor
    start: torch.Tensor
    follow: torch.Tensor
    emitted: torch.Tensor
    left: torch.Tensor
    weight: torch.Tensor
    limits: tuple[float, float] | None = None

    def __getitem__(self, rows: torch.Tensor) -> CopyStates:
        """The copy states of some rows."""
        return CopyStates(self.tokens[rows], *(t[rows] for t in self._floating), self.limits)

    def to(self, dtype: torch.dtype) -> CopyStates:
        return CopyStates(self.tokens, *(t.to(dtype) for t in self._floating), self.limits)

    @property
    def _floating(self) -> tuple[torch.Tensor, ...]:
        return self.start, self.follow, self.emitted, self.left, self.weight

    def initial(self, log_initial: torch.Tensor) -> torch.Tensor:
        """`[B, L, H + J]` log-potentials of a chain that starts at a position, from `[H]`."""
        batch, length, _ = self.start.shape
        entered = logsumexp(log_initial + self.emitted, -1)[:, None] + self.start
        return torch.cat((log_initial.expand(batch, length, -1), entered), -1)

    def soft_evidence(self, log_prob_of) -> torch.Tensor:
        """`[B, L, J]` log-evidence of a prediction.

        Args:
            log_prob_of: maps tokens `[J, B, L]` to their log-probabilities.
        """
        batch, length, number = self.start.shape
        tokens = self.tokens.T[..., None].expand(number, batch, length)
        return log_prob_of(tokens).movedim(0, -1) + self.weight[:, None]


class CopySteps:
    """Transitions over `H + J` states; the interface is that of [`StepTransitions`].

    Args:
        inner: the transitions between the states of the circuit.
        copies: the copy states.
    """

    def __init__(self, inner: StepTransitions, copies: CopyStates):
        self.inner = inner
        self.copies = copies
        self.batch, length, _ = copies.start.shape
        scale = inner.log_scales(length, self.batch).expand(-1, self.batch)  # [L - 1, B]
        scale = torch.cat((scale.new_zeros(1, self.batch), scale))  # [L, B]

        def largest(x: torch.Tensor) -> torch.Tensor:
            return x.detach().amax(-1).T  # [L, B]

        follow = copies.follow[..., 1:]
        total = scale + largest(copies.start).clamp(min=0)
        if follow.shape[-1]:
            total = torch.maximum(total, largest(follow))
        self.scale = total
        share = (scale - total)[..., None, None]
        self.share = share.exp().unbind(0)  # L times [B, 1, 1], of the circuit's own transitions
        self.start = (copies.start.transpose(0, 1)[:, :, None] + share).exp().unbind(0)  # [B, 1, J]
        follow = follow.transpose(0, 1)[:, :, None] - total[..., None, None]
        self.follow = follow.exp().unbind(0)  # [B, 1, J - 1]
        self.emitted, self.left = copies.emitted.exp(), copies.left.exp()
        self.num_latents = copies.emitted.shape[-1]

    @cached_property
    def log_range(self) -> float:
        """As that of `StepTransitions`, for the entries that every state has.

        Following a copy state is an entry of one state alone. If that state's mass was rounded to
        zero, the next one can still be begun anew, from any state, which is not rarer than that.
        """
        if self.copies.limits is None:
            return math.inf
        low, high = self.copies.limits
        fewest, most = self.inner.row_sums
        smallest, largest = self.inner.bounds
        log_range = max(largest, high + max(most, 0.0)) - min(smallest, low + fewest)
        return log_range if log_range == log_range else math.inf

    def log_scales(self, length: int, batch: int) -> torch.Tensor:
        """As those of `StepTransitions`."""
        return self.scale[1:].repeat(1, batch // self.scale.shape[1])

    def _split(self, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S * B, H + J]` as `[B, S, H]` and `[B, S, J]`."""
        parts = vector.unflatten(0, (-1, self.batch)).transpose(0, 1)
        return parts[..., : self.num_latents], parts[..., self.num_latents :]

    def _joined(self, own: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
        return torch.cat((own, copied), -1).transpose(0, 1).flatten(0, 1)

    def _through(self, move, vector: torch.Tensor, position: int) -> torch.Tensor:
        """`inner.forward` or `inner.backward` of `[B, S, H]`."""
        moved = move(vector.transpose(0, 1).flatten(0, 1), position)
        return moved.unflatten(0, (-1, self.batch)).transpose(0, 1)

    def forward(self, message: torch.Tensor, position: int) -> torch.Tensor:
        own, copied = self._split(message)
        moved = self._through(self.inner.forward, torch.baddbmm(own, copied, self.left), position)
        entered = (moved @ self.emitted.transpose(1, 2)) * self.start[position]
        entered[..., 1:].addcmul_(copied[..., :-1], self.follow[position])
        return self._joined(moved * self.share[position], entered)

    def backward(self, weights: torch.Tensor, position: int) -> torch.Tensor:
        own, copied = self._split(weights)
        entered = copied * self.start[position]
        own = torch.baddbmm(own * self.share[position], entered, self.emitted)
        moved = self._through(self.inner.backward, own, position)
        left = moved @ self.left.transpose(1, 2)
        left[..., :-1].addcmul_(copied[..., 1:], self.follow[position])
        return self._joined(moved, left)

    def column(self, state: torch.Tensor, position: int) -> torch.Tensor:
        """`A'(., state)`, `[S, B, H + J]`, up to the scale, of states `[S, B]`."""
        size = self.num_latents + self.copies.tokens.shape[1]
        one_hot = torch.nn.functional.one_hot(state, size).to(self.emitted.dtype)
        return self.backward(one_hot.flatten(0, 1), position).unflatten(0, state.shape)

    def log_matrix(self, position: int) -> torch.Tensor:
        """`[B, H + J, H + J]`; sums over states in float64."""
        matrix = self._anew if self.inner.num_steps == 1 else self._log_matrix_anew(position)
        start, follow = self.copies.start[:, position], self.copies.follow[:, position, 1:]
        first = self.num_latents
        matrix = torch.cat((matrix[..., :first], matrix[..., first:] + start[:, None]), -1)
        above = matrix.diagonal(1, -2, -1)
        on = logsumexp(torch.stack((above[:, first:], follow)), 0)
        return matrix.diagonal_scatter(torch.cat((above[:, :first], on), -1), 1, -2, -1)

    def _log_matrix_anew(self, position: int) -> torch.Tensor:
        """`[B, H + J, H + J]`: `log_matrix` without `start` and without following."""
        copies, inner = self.copies, self.inner.log_matrix(position)
        matrix = inner.expand(len(copies.tokens), -1, -1).double()
        entered = _log_product(matrix, copies.emitted.double().transpose(1, 2))
        rows_of_states = torch.cat((matrix, entered), -1)
        rows_of_copies = _log_product(copies.left.double(), rows_of_states)
        return torch.cat((rows_of_states, rows_of_copies), 1).to(inner.dtype)

    @cached_property
    def _anew(self) -> torch.Tensor:
        """`_log_matrix_anew`, the same at all positions."""
        return self._log_matrix_anew(1)

    def select(self, rows: torch.Tensor) -> CopySteps:
        """The transitions of some rows (of stacked copies of the batch)."""
        return CopySteps(self.inner.select(rows), self.copies[rows % self.batch])


def _log_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`log(exp(a) @ exp(b))`, `[n, I, K]`."""
    rows, columns = (x.detach().amax(dim, keepdim=True) for x, dim in ((a, -1), (b, -2)))
    rows, columns = (x.masked_fill(x == -torch.inf, 0) for x in (rows, columns))
    return safe_log((a - rows).exp() @ (b - columns).exp()) + rows + columns
