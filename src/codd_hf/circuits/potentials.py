r"""The parameters of a circuit: a hidden Markov model as non-negative potentials.

    p_w(x) = \sum_z pi(z_1) E_1(z_1, x_1) \prod_{i>1} A_i(z_{i-1}, z_i) E_i(z_i, x_i)

All are stored as logarithms and need not be normalised, since every query divides by a normaliser.
Transitions and emissions are each shared by all positions ("tied") or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Potentials:
    """Log-potentials of a circuit over a window of `L` positions.

    Attributes:
        initial: `[H]`.
        transition: `[1, H, H]` or `[L-1, H, H]`, row = previous state.
        emission: `[1, H, V]` or `[L, H, V]`.
    """

    initial: torch.Tensor
    transition: torch.Tensor
    emission: torch.Tensor

    @property
    def num_latents(self) -> int:
        return self.initial.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.emission.shape[-1]

    @property
    def tied_emissions(self) -> bool:
        return self.emission.shape[0] == 1

    def scaled_by_marginal(self, log_token_marginal: torch.Tensor, power: float) -> Potentials:
        """Multiplies the emissions `E_i(z, v)` by `u(v) ** power` (`theory`: marginal correction).

        Args:
            log_token_marginal: `[V]` or `[L, V]`.
            power: `-alpha` corrects a circuit, `alpha` takes the correction back.
        """
        shift = power * log_token_marginal.to(self.emission.dtype)
        shift = shift[None, None] if shift.ndim == 1 else shift[:, None]
        return replace(self, emission=self.emission + shift)


def token_marginal(potentials: Potentials, length: int) -> torch.Tensor:
    """Token marginals of the circuit itself: `[V]` if all potentials are tied, else `[L, V]`.

    The tied marginal is the average over the window's positions, which is what text looks like when
    windows are cut anywhere in it.

    Args:
        potentials: a normalised circuit.
        length: the window length `L`.
    """
    state = potentials.initial.exp()
    states = [state]
    for i in range(1, length):
        state = state @ potentials.transition[min(i - 1, len(potentials.transition) - 1)].exp()
        states.append(state)
    occupancy = torch.stack(states)  # [L, H]
    if potentials.tied_emissions:
        return occupancy.mean(0) @ potentials.emission[0].exp()
    return torch.einsum("lh,lhv->lv", occupancy, potentials.emission.exp())
