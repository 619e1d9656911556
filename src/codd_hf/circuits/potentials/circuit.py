r"""The parameters of a circuit: a hidden Markov model as non-negative potentials.

    p_w(x) = \sum_z pi(z_1) E_1(z_1, x_1) \prod_{i>1} A_i(z_{i-1}, z_i) E_i(z_i, x_i)

All are stored as logarithms and need not be normalised, since every query divides by a normaliser.
Transitions and emissions are each shared by all positions ("tied") or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from ...checks.arguments import as_tensor
from ..numerics import shifted_exp
from .emissions import DenseEmission, Emission
from .groups import TokenGroups


@dataclass(frozen=True, eq=False)
class StepTransitions:
    """The transitions of a circuit, ready for use in probability space.

    A chain asks four things of the transitions `A_i(z, z')` into position `i`: `forward`,
    `backward`, `column` (for sampling) and, where those would underflow, `log_matrix`.

    Attributes:
        log_potential: `[1, H, H]` (shared by all steps) or `[L-1, H, H]`, row = previous state.
    """

    log_potential: torch.Tensor

    @property
    def num_steps(self) -> int:
        """1 if all steps share a matrix."""
        return self.log_potential.shape[0]

    def to(self, dtype: torch.dtype) -> StepTransitions:
        """The same in another dtype; itself if that is its dtype."""
        same = self.log_potential.dtype == dtype
        return self if same else StepTransitions(self.log_potential.to(dtype))

    @cached_property
    def _scaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices in probability space, the largest entry 1, and the log of their scale.

        In memory by next state, which is the fastest for products with few vectors.
        """
        matrix, shift = shifted_exp(self.log_potential, (1, 2))
        return matrix.mT.contiguous().mT, shift[:, 0]

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest log-potential."""
        low, high = self.log_potential.detach().aminmax()
        return float(low), float(high)

    @cached_property
    def row_sums(self) -> tuple[float, float]:
        """The logs of the smallest and the largest sum of a row."""
        low, high = self.log_potential.detach().logsumexp(-1).aminmax()
        return float(low), float(high)

    @property
    def log_range(self) -> float:
        """The largest minus the smallest log-potential, in nats; infinite where one is zero."""
        smallest, largest = self.bounds
        return largest - smallest if smallest > -math.inf else math.inf

    def _step(self, position: int) -> int:
        """Index into the stored steps of the one that leads into `position`."""
        return min(max(position - 1, 0), self.num_steps - 1)

    def log_scales(self, length: int, batch: int) -> torch.Tensor:
        """`[length - 1, 1]`: the logs of what the steps into positions 1 ... leave out."""
        return self._scaled[1][[self._step(i) for i in range(1, length)]]

    def forward(self, message: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z message(z) A(z, .)`, `[B, H]`, up to the scale."""
        return message @ self._scaled[0][self._step(position)]

    def backward(self, weights: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z' A(., z') weights(z')`, `[B, H]`, up to the scale."""
        return weights @ self._scaled[0][self._step(position)].T

    def column(self, state: torch.Tensor, position: int) -> torch.Tensor:
        """`A(., state)`, `[*S, H]`, up to the scale, of states `[*S]`."""
        return self._scaled[0][self._step(position)].T[state]

    def log_matrix(self, position: int) -> torch.Tensor:
        """`[1, H, H]`: the same for all rows of a batch."""
        return self.log_potential[self._step(position)][None]

    def select(self, rows: torch.Tensor) -> StepTransitions:
        """The transitions of some rows of a batch: the same for all."""
        return self


@dataclass(frozen=True, eq=False)
class Potentials:
    """Log-potentials of a circuit over a window of `L` positions.

    Attributes:
        initial: `[H]`.
        transition: the steps, or a tensor `[1, H, H]` or `[L-1, H, H]`, row = previous state.
        emission: emissions, or a tensor `[1, H, V]` or `[L, H, V]`.
        log_marginal: `[V]`, log of the (normalised) law by which a top-k prediction's remaining
            mass is spread; needed with top-k evidence only.
    """

    initial: torch.Tensor
    transition: StepTransitions
    emission: Emission
    log_marginal: torch.Tensor | None = None

    def __post_init__(self) -> None:
        hold = partial(object.__setattr__, self)
        hold("initial", as_tensor("initial", self.initial, float))
        if not isinstance(self.transition, StepTransitions):
            hold("transition", StepTransitions(as_tensor("transition", self.transition, float)))
        if not isinstance(self.emission, Emission):
            hold("emission", DenseEmission(as_tensor("emission", self.emission, float)))
        states, emission = tuple(self.initial.shape), self.emission.tensors()[0]
        shapes = states, tuple(self.transition.log_potential.shape), tuple(emission.shape)
        fits = len(states) == 1 and len(shapes[1]) == 3 and shapes[1][1:] == states * 2
        fits = fits and (len(shapes[2]) == 3 or not isinstance(self.emission, DenseEmission))
        if not fits or self.emission.num_latents != states[0] or 0 in sum(shapes, ()):
            raise ValueError(
                "`initial`, `transition` and `emission` must have shapes [H], [1 or L - 1, H, H] "
                f"and [1 or L, H, V], got {', '.join(map(str, shapes))}."
            )
        if self.log_marginal is not None:
            size = (self.vocab_size,)
            hold("log_marginal", as_tensor("log_marginal", self.log_marginal, float, size))

    @property
    def num_latents(self) -> int:
        """`H`."""
        return len(self.initial)

    @property
    def vocab_size(self) -> int:
        """`V`."""
        return self.emission.vocab_size

    @cached_property
    def groups(self) -> TokenGroups:
        """Tokens that look alike to the circuit, for evidence of short lists."""
        assert self.log_marginal is not None
        return TokenGroups.by_state(self.log_marginal, self.emission)

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The tensors of log-potentials that the circuit is made of."""
        return (self.initial, self.transition.log_potential, *self.emission.tensors())

    def with_leaves(self, leaves: Sequence[torch.Tensor]) -> Potentials:
        """A circuit of the same structure from other tensors, in the order of `leaves()`."""
        emission = type(self.emission)(*leaves[2:])
        return Potentials(leaves[0], StepTransitions(leaves[1]), emission)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`initial [H]`, `transition [1 or L-1, H, H]`, `emission [1 or L, H, V]`, all dense."""
        return self.initial, self.transition.log_potential, self.emission.dense()

    def scaled_by_marginal(self, log_token_marginal: torch.Tensor, power: float) -> Potentials:
        """Multiplies the emissions `E_i(z, v)` by `u(v) ** power`, of `log u`, `[V]` or `[L, V]`.

        `-alpha` corrects a circuit, `alpha` takes the correction back.
        """
        return replace(self, emission=self.emission.shifted(power * log_token_marginal))


def occupancy(potentials: Potentials, length: int) -> torch.Tensor:
    """`[L, H]`: how likely a normalised circuit is to be in each state, no token being known."""
    transition = potentials.transition.log_potential.exp()
    states = [potentials.initial.exp()]
    for i in range(length - 1):
        states.append(states[-1] @ transition[min(i, len(transition) - 1)])
    return torch.stack(states)


def token_marginal(potentials: Potentials, length: int) -> torch.Tensor:
    """Token marginals of a normalised circuit: `[V]` if emissions are tied, else `[L, V]`.

    The tied marginal is the average over the window's positions, which is what text looks like when
    windows are cut anywhere in it.
    """
    states, emission = occupancy(potentials, length), potentials.emission.dense()
    if len(emission) == 1:
        return states.mean(0) @ emission[0].exp()
    return torch.einsum("lh,lhv->lv", states, emission.exp())
