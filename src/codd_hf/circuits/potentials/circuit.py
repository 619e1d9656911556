r"""The parameters of a circuit: a hidden Markov model as non-negative potentials.

    p_w(x) = \sum_z pi(z_1) E_1(z_1, x_1) \prod_{i>1} A_i(z_{i-1}, z_i) E_i(z_i, x_i)

All are stored as logarithms and need not be normalised, since every query divides by a normaliser.
Transitions and emissions are each shared by all positions or not. *Dense* emissions are a matrix;
*tied* ones are made from the backbone's output embedding `W_out`,

    log E(z, v) = <P W_out(v), U_z> + b_v,

of `r (d + H) + V` parameters instead of `H V`. Products with the whole vocabulary go through it a
slice at a time, exponentiated as it comes. What is derived is held as long as the object: with a
frozen circuit it is derived once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch.nn import functional as F

from ...checks.arguments import as_tensor
from ..recursions.chain import shifted_exp
from .groups import TokenGroups

UNDERFLOW = 1e-30
"""A sum of float32 products below this may lack terms that were rounded to zero."""

ONE_PRODUCT, ELEMENTS_AT_ONCE = 1 << 24, 1 << 22
"""Emissions of so many numbers are exponentiated whole; the largest temporary of all others."""

LOG2_E = math.log2(math.e)

Rows = torch.Tensor | slice
Factors = Callable[[], torch.Tensor]


def exp_of_difference(x: torch.Tensor, shift: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`exp(factor x - shift)`, of a finite shift; three times as fast as `exp` on a CPU."""
    return torch.add(-LOG2_E * shift, x, alpha=factor * LOG2_E).exp2_()


@dataclass(frozen=True, eq=False)
class StepTransitions:
    """The transitions of a circuit, `[1 or L-1, H, H]` log-potentials, row = previous state."""

    log_potential: torch.Tensor

    @property
    def num_steps(self) -> int:
        """1 if they are shared."""
        return len(self.log_potential)

    def to(self, dtype: torch.dtype) -> StepTransitions:
        """The same in another dtype; itself if that is its dtype."""
        same = self.log_potential.dtype == dtype
        return self if same else StepTransitions(self.log_potential.to(dtype))

    def select(self, rows: torch.Tensor) -> StepTransitions:
        """The transitions of some rows of a batch: the same for all."""
        return self

    @cached_property
    def _scaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices in probability space, the largest entry 1, and the log of their scale."""
        matrix, shift = shifted_exp(self.log_potential, (1, 2))
        return matrix.mT.contiguous().mT, shift[:, 0]  # the fastest with few vectors

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """The smallest and the largest log-potential, and log of the sum of a row."""
        matrix = self.log_potential.detach()
        return tuple(map(float, (*matrix.aminmax(), *matrix.logsumexp(-1).aminmax())))

    @property
    def log_range(self) -> float:
        """The largest minus the smallest log-potential, in nats; infinite where one is zero."""
        smallest, largest, *_ = self.bounds
        return largest - smallest if smallest > -math.inf else math.inf

    def _step(self, position: int) -> int:
        return min(max(position - 1, 0), self.num_steps - 1)

    def log_scales(self, length: int, batch: int) -> torch.Tensor:
        """`[length - 1, 1]`: the logs of what the steps into positions 1 ... leave out."""
        return self._scaled[1][[self._step(i) for i in range(1, length)]]

    def forward(self, message: torch.Tensor, position: int) -> torch.Tensor:
        """`sum_z message(z) A_i(z, .)`, `[B, H]`, up to the scale, of a step into a position."""
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

    def dense(self) -> torch.Tensor:
        """`[1 or L, H, V]`, made whole."""
        every = range(self.num_positions)
        return torch.stack([next(self.chunks(self.vocab_size, i)) for i in every])

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that make up the emissions."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def parts(self, size: int) -> Sequence[Emission]:
        """The emissions by parts of so many states, if it is as fast to make them apart."""
        return (self,)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return self.tensors()[0].dtype

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

    @property
    def width(self) -> int:
        """How many tokens go into one product: all, or a slice."""
        if self.num_latents * self.vocab_size <= ONE_PRODUCT:
            return self.vocab_size
        return max(ELEMENTS_AT_ONCE // self.num_latents, 1)

    @cached_property
    @torch.no_grad()
    def _extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1 or L, H]`, each state's smallest and largest `log E(z, v)`."""
        low, high = [], []
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
        """`[N or 1, H]`: `log_max` of positions `[N]`; 0 of a state that emits nothing."""
        scale = self.log_max if self.num_positions == 1 else self.log_max[positions]
        return scale.masked_fill(scale == -torch.inf, 0)

    @cached_property
    @torch.no_grad()
    def _whole(self) -> torch.Tensor:
        """`[H, V]`: the factors of a small emission that is the same at all positions."""
        return exp_of_difference(self.dense()[0].to(self.log_max.dtype), self.log_scale().T)

    def factors(self, position: int, dtype: torch.dtype) -> Iterator[tuple[slice, Factors]]:
        """Slices of the vocabulary, and for each what makes `E_i / exp(log_scale)`, `[H, n]`.

        Made by whoever needs them, one slice is let go before the next: two at a time would take
        new memory for each.
        """
        is_small = self.num_positions == 1 and self.width == self.vocab_size
        if is_small and not torch.is_grad_enabled() and self.log_max.dtype == dtype:
            yield slice(None), lambda: self._whole
            return
        scale, first = self.log_scale(position).view(-1, 1).to(dtype), 0
        for chunk in self.chunks(self.width, position):
            part = slice(first, first + chunk.shape[-1])
            yield part, partial(exp_of_difference, chunk.to(dtype), scale)
            first = part.stop

    def sums(self, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[N, H]`: sums of the factors of all tokens by weights `[N, V]`, at positions `[N]`."""

        def at(position: int, rows: Rows) -> torch.Tensor:
            counted, factors = weights[rows], self.factors(position, weights.dtype)
            zero = counted.new_zeros(len(counted), self.num_latents)
            return sum((counted[:, part] @ make().T for part, make in factors), zero)

        return self._by_position(positions, at)

    def mixtures(self, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[N, V]`: sums of the factors of all states by weights `[N, H]`, at positions `[N]`."""

        def at(position: int, rows: Rows) -> torch.Tensor:
            factors = self.factors(position, weights.dtype)
            return torch.cat([weights[rows] @ make() for _, make in factors], -1)

        return self._by_position(positions, at)

    def _by_position(
        self, positions: torch.Tensor, at: Callable[[int, Rows], torch.Tensor]
    ) -> torch.Tensor:
        """What `at(position, rows)` makes of the rows at each position, in their order."""
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

    def parts(self, size: int) -> Sequence[Emission]:
        """Rows of the matrix."""
        return [*map(DenseEmission, self.log_potential.split(size, 1))]


@dataclass(frozen=True, eq=False)
class TiedEmission(Emission):
    """Emissions of `latents U [H, r]`, `embedding P W_out [V, r]` and `bias b [V]`."""

    latents: torch.Tensor
    embedding: torch.Tensor
    bias: torch.Tensor

    def columns(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Made of the tokens' embeddings."""
        return self._log(F.embedding(tokens, self.embedding), self.latents, self.bias[tokens, None])

    def rows(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Made of the states'."""
        return self._log(self.latents[latents], self.embedding, self.bias)

    def chunks(self, size: int, position: int = 0) -> Iterator[torch.Tensor]:
        """Made of slices of the embedding."""
        for embedding, bias in zip(self.embedding.split(size), self.bias.split(size), strict=True):
            yield self._log(self.latents, embedding, bias)

    def _log(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.T + bias


@dataclass(frozen=True, eq=False)
class Potentials:
    """Log-potentials of a circuit over a window of `L` positions.

    Attributes:
        initial: `[H]`.
        transition: the steps, or a tensor `[1, H, H]` or `[L-1, H, H]`, row = previous state.
        emission: emissions, or a tensor `[1, H, V]` or `[L, H, V]`.
        log_marginal: `[V]`, how unlisted tokens share their mass.
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
    def groups(self) -> TokenGroups | None:
        """Tokens alike to the circuit, for short lists; None without a marginal."""
        marginal = self.log_marginal
        return None if marginal is None else TokenGroups.by_state(marginal, self.emission)

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
