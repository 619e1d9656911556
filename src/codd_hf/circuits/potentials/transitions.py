"""How latents follow one another: the transition potentials.

A chain asks four things of its transitions `A_i(z, z')`, the potential of the step into position
`i`: `forward` (row vector times matrix), `backward` (matrix times column vector), `column` (for
backward sampling), and `log_matrix` (all of it, in log space, where those would underflow).
`CopySteps` of `copies.py` answers the same for a chain that can copy as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..numerics import shifted_exp


@dataclass(frozen=True)
class StepTransitions:
    """The transitions of a circuit, ready for use in probability space.

    Attributes:
        log_potential: `[1, H, H]` (shared by all steps) or `[L-1, H, H]`, row = previous state.
    """

    log_potential: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor]:
        """The log-potentials."""
        return (self.log_potential,)

    @property
    def num_steps(self) -> int:
        return self.log_potential.shape[0]

    @property
    def num_latents(self) -> int:
        return self.log_potential.shape[-1]

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
        return _extremes(self.log_potential.detach())

    @cached_property
    def row_sums(self) -> tuple[float, float]:
        """The logs of the smallest and the largest sum of a row."""
        return _extremes(self.log_potential.detach().logsumexp(-1))

    @property
    def log_range(self) -> float:
        """The largest minus the smallest log-potential, in nats; infinite where one is zero."""
        smallest, largest = self.bounds
        return largest - smallest if smallest > -math.inf else math.inf

    def step(self, position: int) -> int:
        """Index into the stored steps of the one that leads into `position`."""
        return min(max(position - 1, 0), self.num_steps - 1)

    def log_scales(self, length: int, batch: int) -> torch.Tensor:
        """`[length - 1, 1]`: the logs of what the steps into positions 1 ... leave out."""
        return self._scaled[1][[self.step(i) for i in range(1, length)]]

    def forward(self, message: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z message(z) A(z, .)`, `[B, H]`, up to the scale."""
        return message @ self._scaled[0][self.step(position)]

    def backward(self, weights: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z' A(., z') weights(z')`, `[B, H]`, up to the scale."""
        return weights @ self._scaled[0][self.step(position)].T

    def column(self, state: torch.Tensor, position: int) -> torch.Tensor:
        """`A(., state)`, `[*S, H]`, up to the scale, of states `[*S]`."""
        return self._scaled[0][self.step(position)].T[state]

    def log_matrix(self, position: int) -> torch.Tensor:
        """`[1, H, H]`: the same for all rows of a batch."""
        return self.log_potential[self.step(position)][None]

    def select(self, rows: torch.Tensor) -> StepTransitions:
        """The transitions of some rows of a batch: the same for all."""
        return self


def _extremes(x: torch.Tensor) -> tuple[float, float]:
    low, high = x.aminmax()
    return float(low), float(high)
