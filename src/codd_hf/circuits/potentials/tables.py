r"""What evidence needs of a whole emission and of the distribution that it spreads mass by.

Everything is computed when it is first asked for and held as long as its object: with a frozen
circuit, once. Large emissions are exponentiated a slice of the vocabulary at a time, and never
copied whole; `E(z, v)` is always divided by its largest value for the state, `exp(log_max(z))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.utils.checkpoint import checkpoint

from ..numerics import exp_of_difference
from .emissions import Emission

UNDERFLOW = 1e-30
"""A sum of float32 products below this may lack terms that were rounded to zero."""

ONE_PRODUCT = 1 << 24
"""Emissions of at most this many numbers are exponentiated whole: fewer products are faster."""

ELEMENTS_AT_ONCE = 1 << 22
"""Largest temporary, in numbers, of everything else."""


@dataclass(frozen=True, eq=False)
class EmissionTables:
    """Tables of an emission."""

    emission: Emission

    @property
    def device(self) -> torch.device:
        return self.emission.device

    @cached_property
    @torch.no_grad()
    def _extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        extremes = []
        with torch.autocast(self.device.type, enabled=False):
            for position in range(self.emission.num_positions):
                # `aminmax` would be one pass, but takes three times as long.
                parts = [(m.amin(1), m.amax(1)) for _, m in self._chunks(position)]
                low, high = (torch.stack(values) for values in zip(*parts, strict=True))
                extremes.append((low.amin(0), high.amax(0)))
        dtype = torch.promote_types(self.emission.dtype, torch.float32)
        return tuple(torch.stack(values).to(dtype) for values in zip(*extremes, strict=True))

    @property
    def log_min(self) -> torch.Tensor:
        """`[1 or L, H]`, each state's smallest `log E(z, v)`."""
        return self._extremes[0]

    @property
    def log_max(self) -> torch.Tensor:
        """`[1 or L, H]`, the largest."""
        return self._extremes[1]

    @cached_property
    def can_underflow(self) -> bool:
        """Whether a sum over tokens could: some state likes some tokens so much more."""
        log_range = self.log_max - self.log_min  # NaN for a state that emits nothing
        return not bool((log_range.exp() < 1 / UNDERFLOW).all())

    def log_scale(self, positions: torch.Tensor | int = 0) -> torch.Tensor:
        """`[N or 1, H]`: the logs of what `E_i(z, .)` is divided by at positions `[N]`."""
        scale = self.log_max if len(self.log_max) == 1 else self.log_max[positions]
        return scale.masked_fill(scale == -torch.inf, 0)

    @property
    def _width(self) -> int:
        """How many tokens go into one product."""
        if self.emission.num_latents * self.emission.vocab_size <= ONE_PRODUCT:
            return self.emission.vocab_size
        return max(ELEMENTS_AT_ONCE // self.emission.num_latents, 1)

    def _chunks(self, position: int) -> Iterator[tuple[slice, torch.Tensor]]:
        return self.emission.chunks(self._width, position)

    @cached_property
    @torch.no_grad()
    def _whole(self) -> torch.Tensor:
        """`[H, V]`: all factors of a small emission that is the same at all positions."""
        with torch.autocast(self.device.type, enabled=False):
            emission = self.emission.dense()[0].to(self.log_max.dtype)
            return exp_of_difference(emission, self.log_scale().T)

    def factors(
        self, position: int, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Callable[[], torch.Tensor]]]:
        """Slices of the vocabulary, and functions that make their factors `[H, n]`:
        `E_i(z, v) / exp(log_max(z))`."""
        small = self._width == self.emission.vocab_size and self.emission.num_positions == 1
        if small and not torch.is_grad_enabled() and self._whole.dtype == dtype:
            yield slice(None), lambda: self._whole
            return
        scale = self.log_scale(position).view(-1, 1).to(dtype)
        for part, log_emission in self._chunks(position):
            yield part, partial(exp_of_difference, log_emission.to(dtype), scale)

    def sums(self, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[N, H]`: sums of the factors of all tokens by weights `[N, V]`, at positions `[N]`."""

        def at(position: int, rows: torch.Tensor | slice) -> torch.Tensor:
            counted = weights[rows]
            total = counted.new_zeros(len(counted), self.emission.num_latents)
            for part, make in self.factors(position, weights.dtype):

                def add(total, counted, make=make):
                    return total + counted @ make().T

                total = self._held_briefly(add, total, counted[:, part])
            return total

        return self.by_position(positions, at)

    def _held_briefly(self, function: Callable, *tensors: torch.Tensor) -> torch.Tensor:
        """What a function of one slice's factors gives.

        With gradients they are made again in the backward pass: held, they add up to the emission.
        """
        if torch.is_grad_enabled() and self._width < self.emission.vocab_size:
            return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
        return function(*tensors)

    def by_position(
        self, positions: torch.Tensor, at: Callable[[int, torch.Tensor | slice], torch.Tensor]
    ) -> torch.Tensor:
        """What `at(position, rows)` makes of the rows at each position `[N]`, in their order."""
        if self.emission.num_positions == 1 or not len(positions):
            return at(0, slice(None))
        places = {i: (positions == i).nonzero()[:, 0] for i in positions.unique().tolist()}
        made = [at(i, rows) for i, rows in places.items()]
        return torch.cat(made)[torch.cat([*places.values()]).argsort()]


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """A distribution over the vocabulary by which mass is spread, group by group.

    Attributes:
        log_marginal: `[1 or L, V]`, its logarithm.
        index: `[V]`, the group of each token; None where all tokens are one group.
        tables: of an emission, for `means`.
    """

    log_marginal: torch.Tensor
    index: torch.Tensor | None = None
    tables: EmissionTables | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, log_marginal: torch.Tensor, tables: EmissionTables) -> TokenGroups:
        """Tokens grouped by the state that emits them most readily, so that those of a group look
        alike to the circuit; all in one where positions differ."""
        emission, index = tables.emission, None
        if emission.num_positions == len(log_marginal) == 1:
            with torch.autocast(emission.device.type, enabled=False):
                index = torch.cat([matrix.argmax(0) for _, matrix in tables._chunks(0)])
        return cls(log_marginal, index, tables)

    @property
    def number(self) -> int:
        return 1 if self.index is None else self.tables.emission.num_latents

    @cached_property
    def mass(self) -> torch.Tensor:
        """`[C]`, of each group."""
        if self.index is None:
            return self.log_marginal.new_ones(1)
        marginal = self.log_marginal[0].exp()
        return marginal.new_zeros(self.number).index_add_(0, self.index, marginal)

    def means(self) -> torch.Tensor:
        """`[C or L, H]`: sums of `u(v) E(z, v) / exp(log_max(z))` over each group `c`, or over all
        tokens at each position; differentiable."""
        gradients = torch.is_grad_enabled()
        if gradients and any(part.requires_grad for part in self.tables.emission.tensors()):
            return self._make_means()
        return self._means

    @cached_property
    @torch.no_grad()
    def _means(self) -> torch.Tensor:
        return self._make_means()

    def _make_means(self) -> torch.Tensor:
        tables = self.tables
        marginal = self.log_marginal.to(tables.log_max.dtype).exp()
        if self.index is None:
            length = max(tables.emission.num_positions, len(marginal))
            positions = torch.arange(length, device=marginal.device)
            return tables.sums(marginal.expand(length, -1), positions)
        means = marginal.new_zeros(self.number, self.number)
        for part, make in tables.factors(0, marginal.dtype):

            def add(means, part=part, make=make):
                return means.index_add(0, self.index[part], (make() * marginal[0, part]).T)

            means = tables._held_briefly(add, means)
        return means
