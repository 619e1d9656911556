r"""The parameters of a circuit: a hidden Markov model as non-negative potentials.

    p_w(x) = \sum_z pi(z_1) E_1(z_1, x_1) \prod_{i>1} A_i(z_{i-1}, z_i) E_i(z_i, x_i)

All are stored as logarithms and need not be normalised, since every query divides by a normaliser.
Transitions and emissions are each shared by all positions ("tied") or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from ...checks.arguments import as_tensor
from ..numerics import log_softmax
from .emissions import DenseEmission, Emission, TiedEmission
from .tables import EmissionTables, TokenGroups
from .transitions import StepTransitions


@dataclass(frozen=True)
class Potentials:
    """Log-potentials of a circuit over a window of `L` positions.

    Attributes:
        initial: `[H]`.
        transition: the steps, or a tensor `[1, H, H]` or `[L-1, H, H]`, row = previous state.
        emission: emissions, or a tensor `[1, H, V]` or `[L, H, V]`.
        log_marginal: `[1 or L, V]`, log of the (normalised) law by which a top-k prediction's
            remaining mass is spread; needed with top-k evidence only.
    """

    initial: torch.Tensor
    transition: StepTransitions
    emission: Emission
    log_marginal: torch.Tensor | None = None

    def __post_init__(self):
        hold = partial(object.__setattr__, self)
        hold("initial", as_tensor("initial", self.initial, float))
        if not isinstance(self.transition, StepTransitions):
            hold("transition", StepTransitions(as_tensor("transition", self.transition, float)))
        if not isinstance(self.emission, Emission):
            hold("emission", DenseEmission(as_tensor("emission", self.emission, float)))
        if self.initial.ndim != 1 or not len(self.initial):
            raise ValueError(f"`initial` must have shape [H], got {tuple(self.initial.shape)}.")
        for name in ("transition", "emission"):
            part = getattr(self, name)
            for tensor in part.tensors():
                as_tensor(name, tensor, float)
            shape = tuple(part.tensors()[0].shape)
            square = name == "emission" or shape[-2:-1] == shape[-1:]
            if not isinstance(part, TiedEmission) and (len(shape) != 3 or not square or 0 in shape):
                wanted = "[1 or L - 1, H, H]" if name == "transition" else "[1 or L, H, V]"
                raise ValueError(f"`{name}` must have shape {wanted}, got {shape}.")
            if part.num_latents != len(self.initial):
                raise ValueError(
                    f"`{name}` has {part.num_latents} latent states, but `initial` "
                    f"{len(self.initial)}."
                )
        if self.log_marginal is not None:
            hold("log_marginal", as_tensor("log_marginal", self.log_marginal, float))
            shape, size = tuple(self.log_marginal.shape), self.vocab_size
            if len(shape) != 2 or shape[0] == 0 or shape[1] != size:
                raise ValueError(f"`log_marginal` must have shape [1 or L, {size}], got {shape}.")

    @property
    def num_latents(self) -> int:
        return self.initial.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.emission.vocab_size

    @cached_property
    def tables(self) -> EmissionTables:
        """What evidence needs of all emissions."""
        return EmissionTables(self.emission)

    @cached_property
    def groups(self) -> TokenGroups:
        """Tokens that look alike to the circuit, for evidence of short lists."""
        return TokenGroups.of(self.log_marginal, self.tables)

    def log_marginal_without(self, forbidden: torch.Tensor | None) -> torch.Tensor:
        """`log_marginal` without some tokens, `[V]` bool; mostly itself."""
        marginal = self.log_marginal
        if forbidden is None or not bool((forbidden & (marginal > -torch.inf)).any()):
            return marginal
        return log_softmax(marginal.masked_fill(forbidden, -torch.inf))

    def groups_without(self, forbidden: torch.Tensor | None) -> TokenGroups:
        """`groups` that spread nothing over some tokens, `[V]` bool; mostly `groups` themselves."""
        marginal = self.log_marginal_without(forbidden)
        same = marginal is self.log_marginal
        return self.groups if same else TokenGroups.of(marginal, self.tables)

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The tensors of log-potentials that the circuit is made of."""
        return (self.initial, *self.transition.tensors(), *self.emission.tensors())

    def with_leaves(self, leaves: Sequence[torch.Tensor]) -> Potentials:
        """A circuit of the same structure from other tensors, in the order of `leaves()`."""
        return Potentials(leaves[0], leaves[1], type(self.emission)(*leaves[2:]))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`initial [H]`, `transition [1 or L-1, H, H]`, `emission [1 or L, H, V]`, all dense."""
        return self.initial, self.transition.log_potential, self.emission.dense()

    def scaled_by_marginal(self, log_token_marginal: torch.Tensor, power: float) -> Potentials:
        """Multiplies the emissions `E_i(z, v)` by `u(v) ** power` (`theory`: marginal correction).

        Args:
            log_token_marginal: `[V]` or `[L, V]`.
            power: `-alpha` corrects a circuit, `alpha` takes the correction back.
        """
        return replace(self, emission=self.emission.shifted(power * log_token_marginal))


def occupancy(potentials: Potentials, length: int) -> torch.Tensor:
    """`[L, H]`: how likely a normalised circuit is to be in each state, no token being known."""
    transition = potentials.transition.log_potential.exp()
    state = potentials.initial.exp()
    states = [state]
    for i in range(1, length):
        state = state @ transition[min(i - 1, len(transition) - 1)]
        states.append(state)
    return torch.stack(states)


def token_marginal(potentials: Potentials, length: int) -> torch.Tensor:
    """Token marginals of the circuit itself: `[V]` if all potentials are tied, else `[L, V]`.

    The tied marginal is the average over the window's positions, which is what text looks like when
    windows are cut anywhere in it.

    Args:
        potentials: a normalised circuit.
        length: the window length `L`.
    """
    states, emission = occupancy(potentials, length), potentials.emission.dense()
    if len(emission) == 1:
        return states.mean(0) @ emission[0].exp()
    return torch.einsum("lh,lhv->lv", states, emission.exp())
