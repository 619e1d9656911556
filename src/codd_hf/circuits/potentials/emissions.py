r"""Emission potentials `E(z, v)`: what the vocabulary looks like from a latent state.

*Dense* ones are a matrix. *Tied* ones are made from the backbone's output embedding `W_out`,

    log E(z, v) = <P W_out(v), U_z> + b_v,

which costs `r (d + H) + V` parameters instead of `H V`. Tokens give columns and latents give rows.
Products with the whole vocabulary go through it a slice at a time, exponentiated as it comes and
divided by the state's largest value, `exp(log_max(z))`. What is derived is held as long as the
object: with a frozen circuit it is derived once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..numerics import exp_of_difference

UNDERFLOW = 1e-30
"""A sum of float32 products below this may lack terms that were rounded to zero."""

ONE_PRODUCT = 1 << 24
"""Emissions of at most this many numbers are exponentiated whole: fewer products are faster."""

ELEMENTS_AT_ONCE = 1 << 22
"""Largest temporary, in numbers, of everything else."""

Rows = torch.Tensor | slice
Fold = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Emission(ABC):
    """Emissions of `H` states and `V` tokens, the same at all positions or of `L` positions."""

    @abstractmethod
    def columns(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`log E_i(., v)`, `[..., H]`, of tokens and the positions where they stand, `[...]`."""

    @abstractmethod
    def rows(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`log E_i(z, .)`, `[..., V]`, of latents and their positions, `[...]`."""

    @abstractmethod
    def chunks(self, size: int, position: int = 0) -> Iterator[torch.Tensor]:
        """`log E_i [H, n]` of slices of the vocabulary, one after the other."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """`[1 or L, H, V]`."""

    @abstractmethod
    def shifted(self, by: torch.Tensor) -> Emission:
        """With `by`, `[V]` or `[L, V]`, added."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that make up the emissions."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return self.tensors()[0].device

    @property
    def num_positions(self) -> int:
        """1 if all positions share the emissions."""
        first = self.tensors()[0]
        return len(first) if first.ndim == 3 else 1

    @property
    def num_latents(self) -> int:
        """`H`."""
        return self.tensors()[0].shape[-2]

    @property
    def vocab_size(self) -> int:
        """`V`."""
        return self.tensors()[-1].shape[-1]

    @cached_property
    @torch.no_grad()
    def _extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1 or L, H]`, each state's smallest and largest `log E(z, v)`."""
        low, high = [], []
        with torch.autocast(self.device.type, enabled=False):
            for position in range(self.num_positions):
                # `aminmax` would be one pass, but takes three times as long.
                chunks = [(c.amin(1), c.amax(1)) for c in self.chunks(self.width, position)]
                low.append(torch.stack([least for least, _ in chunks]).amin(0))
                high.append(torch.stack([most for _, most in chunks]).amax(0))
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.stack(low).to(dtype), torch.stack(high).to(dtype)

    @property
    def log_max(self) -> torch.Tensor:
        """`[1 or L, H]`, each state's largest `log E(z, v)`, in float32 at least."""
        return self._extremes[1]

    @cached_property
    def can_underflow(self) -> bool:
        """Whether a sum over tokens could: some state likes some tokens so much more."""
        low, high = self._extremes  # the difference is NaN for a state that emits nothing
        return not bool(((high - low).exp() < 1 / UNDERFLOW).all())

    def log_scale(self, positions: torch.Tensor | int = 0) -> torch.Tensor:
        """`[N or 1, H]`: the logs of what `E_i(z, .)` is divided by at positions `[N]`."""
        scale = self.log_max if self.num_positions == 1 else self.log_max[positions]
        return scale.masked_fill(scale == -torch.inf, 0)

    @property
    def width(self) -> int:
        """How many tokens go into one product: all, or a slice."""
        if self.num_latents * self.vocab_size <= ONE_PRODUCT:
            return self.vocab_size
        return max(ELEMENTS_AT_ONCE // self.num_latents, 1)

    @cached_property
    @torch.no_grad()
    def _whole(self) -> torch.Tensor:
        """`[H, V]`: the factors of a small emission that is the same at all positions."""
        with torch.autocast(self.device.type, enabled=False):
            return exp_of_difference(self.dense()[0].to(self.log_max.dtype), self.log_scale().T)

    def _factors(
        self, position: int, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Callable[[], torch.Tensor]]]:
        """Slices of the vocabulary, and what makes `E_i(z, v) / exp(log_max(z))`, `[H, n]`."""
        is_small = self.num_positions == 1 and self.width == self.vocab_size
        if is_small and not torch.is_grad_enabled() and self.log_max.dtype == dtype:
            yield slice(None), lambda: self._whole
            return
        scale, first = self.log_scale(position).view(-1, 1).to(dtype), 0
        for chunk in self.chunks(self.width, position):
            part = slice(first, first + chunk.shape[-1])
            yield part, partial(exp_of_difference, chunk.to(dtype), scale)
            first = part.stop

    def fold(self, function: Fold, value: torch.Tensor, position: int = 0) -> torch.Tensor:
        """`value = function(value, factors, part)` over slices `part` of the vocabulary.

        With gradients factors are made again in the backward pass: held, they add up to the
        emission.
        """
        for part, make in self._factors(position, value.dtype):

            def step(value: torch.Tensor, part: slice = part, make: Any = make) -> torch.Tensor:
                return function(value, make(), part)

            if torch.is_grad_enabled() and self.width < self.vocab_size:
                value = checkpoint(step, value, use_reentrant=False, preserve_rng_state=False)
            else:
                value = step(value)
        return value

    def sums(self, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[N, H]`: sums of the factors of all tokens by weights `[N, V]`, at positions `[N]`."""

        def at(position: int, rows: Rows) -> torch.Tensor:
            counted = weights[rows]
            zero = counted.new_zeros(len(counted), self.num_latents)
            return self.fold(lambda sums, e, part: sums + counted[:, part] @ e.T, zero, position)

        return self._by_position(positions, at)

    def mixtures(self, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[N, V]`: sums of the factors of all states by weights `[N, H]`, at positions `[N]`."""

        def at(position: int, rows: Rows) -> torch.Tensor:
            factors = self._factors(position, weights.dtype)
            return torch.cat([weights[rows] @ make() for _, make in factors], -1)

        return self._by_position(positions, at)

    def _by_position(
        self, positions: torch.Tensor, at: Callable[[int, Rows], torch.Tensor]
    ) -> torch.Tensor:
        """What `at(position, rows)` makes of the rows at each position `[N]`, in their order."""
        if self.num_positions == 1 or not len(positions):
            return at(0, slice(None))
        places = {i: (positions == i).nonzero()[:, 0] for i in positions.unique().tolist()}
        made = [at(i, rows) for i, rows in places.items()]
        return torch.cat(made)[torch.cat([*places.values()]).argsort()]


@dataclass(frozen=True, eq=False)
class DenseEmission(Emission):
    """Log-potentials `[1, H, V]` (shared by all positions) or `[L, H, V]`."""

    log_potential: torch.Tensor

    def columns(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Columns of the matrix."""
        if self.num_positions == 1:
            return F.embedding(tokens, self.log_potential[0].T)
        return self.log_potential.transpose(1, 2)[positions, tokens]

    def rows(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix."""
        if self.num_positions == 1:
            return self.log_potential[0][latents]
        return self.log_potential[positions, latents]

    def chunks(self, size: int, position: int = 0) -> Iterator[torch.Tensor]:
        """Slices of the matrix."""
        # Split, not sliced: the backward pass of a slice fills a whole matrix with zeros.
        yield from self.log_potential[position if self.num_positions > 1 else 0].split(size, -1)

    def dense(self) -> torch.Tensor:
        """The matrix itself, or made whole."""
        return self.log_potential

    def shifted(self, by: torch.Tensor) -> DenseEmission:
        """The matrix with a number added to each token's."""
        by = by.to(self.dtype)
        return DenseEmission(self.log_potential + (by if by.ndim == 1 else by[:, None]))

    @property
    def stored_by_latent(self) -> bool:
        """Whether a matrix has a state's tokens, not a token's states, side by side."""
        return self.num_positions == 1 and self.log_potential.stride(-1) == 1


@dataclass(frozen=True, eq=False)
class TiedEmission(Emission):
    """Emissions that share the backbone's output embedding; the same at all positions.

    Attributes:
        latents: `U [H, r]`.
        embedding: `P W_out [V, r]`, the projected output embedding.
        bias: `b [V]`.
    """

    latents: torch.Tensor
    embedding: torch.Tensor
    bias: torch.Tensor

    def columns(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Columns of the matrix."""
        return F.embedding(tokens, self.embedding) @ self.latents.T + self.bias[tokens][..., None]

    def rows(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix."""
        return self.latents[latents] @ self.embedding.T + self.bias

    def chunks(self, size: int, position: int = 0) -> Iterator[torch.Tensor]:
        """Slices of the matrix."""
        for embedding, bias in zip(self.embedding.split(size), self.bias.split(size), strict=True):
            yield self.latents @ embedding.T + bias

    def dense(self) -> torch.Tensor:
        """The matrix itself, or made whole."""
        return (self.latents @ self.embedding.T + self.bias)[None]

    def shifted(self, by: torch.Tensor) -> TiedEmission:
        """The matrix with a number added to each token's."""
        return TiedEmission(self.latents, self.embedding, self.bias + by.to(self.dtype))


@torch.no_grad()
def fit_tied(
    log_emission: torch.Tensor, output_embedding: torch.Tensor, weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tied emissions closest to dense ones, by weighted least squares on the logarithms.

    Args:
        log_emission: `[H, V]`.
        output_embedding: `W_out [V, d]`.
        weights: `[V]`, what a token counts (its frequency).
        rank: `r`; no more than `d` or `H` is used, the rest stays zero.

    Returns:
        `U [H, r]`, `P [r, d]` and the bias `b [V]`, the mean over the states.
    """
    target, embedding = log_emission.double(), output_embedding.double()
    bias = target.mean(0)
    weighted = embedding.T * weights.double()
    gram = weighted @ embedding
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    map_ = torch.linalg.solve(gram, weighted @ (target - bias).T).T  # [H, d]
    # The best rank-r map in the metric in which errors are counted.
    root = torch.linalg.cholesky(gram)
    left, scale, right = torch.linalg.svd(map_ @ root, full_matrices=False)
    kept = min(rank, len(scale))
    latents = target.new_zeros(len(target), rank)
    projection = target.new_zeros(rank, len(gram))
    latents[:, :kept] = left[:, :kept] * scale[:kept].sqrt()
    projection[:kept] = torch.linalg.solve_triangular(
        root, scale[:kept, None].sqrt() * right[:kept], upper=False, left=False
    )
    return latents, projection, bias
