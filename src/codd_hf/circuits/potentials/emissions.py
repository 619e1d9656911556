r"""Emission potentials `E(z, v)`: what the vocabulary looks like from a latent state.

*Dense* ones are a matrix. *Tied* ones are made from the backbone's output embedding `W_out`,

    log E(z, v) = <P W_out(v), U_z> + b_v,

which costs `r (d + H) + V` parameters instead of `H V`. Nothing here ever needs all of a tied
matrix: tokens give columns, latents give rows, and products with the whole vocabulary go through
it in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F


class Emission:
    """The common part of emissions: the same at all positions, unless they say otherwise."""

    num_positions = 1

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that make up the emissions."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def rows_into(self, out: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor) -> None:
        """Writes `rows` of latents and positions `[n]` into `out [n, V]`."""
        out.copy_(self.rows(latents, positions))


@dataclass(frozen=True)
class DenseEmission(Emission):
    """Log-potentials `[1, H, V]` (shared by all positions) or `[L, H, V]`."""

    log_potential: torch.Tensor

    @property
    def num_positions(self) -> int:
        return self.log_potential.shape[0]

    @property
    def num_latents(self) -> int:
        return self.log_potential.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.log_potential.shape[-1]

    def columns(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`log E_i(., v)`, `[..., H]`, of tokens and the positions where they stand, `[...]`."""
        if self.num_positions == 1:
            return F.embedding(tokens, self.log_potential[0].T)
        return self.log_potential.transpose(1, 2)[positions, tokens]

    def rows(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`log E_i(z, .)`, `[..., V]`, of latents and their positions, `[...]`."""
        if self.num_positions == 1:
            return self.log_potential[0][latents]
        return self.log_potential[positions, latents]

    def rows_into(self, out: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor) -> None:
        """Writes `rows` of latents and positions `[n]` into `out [n, V]`."""
        if self.num_positions == 1 and out.dtype == self.dtype:
            torch.index_select(self.log_potential[0], 0, latents, out=out)
        else:
            super().rows_into(out, latents, positions)

    def chunks(self, size: int, position: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the vocabulary and their `log E [H, n]`."""
        matrix = self.log_potential[position if self.num_positions > 1 else 0]
        # Split, not sliced: the backward pass of a slice fills a whole matrix with zeros.
        for number, part in enumerate(matrix.split(size, -1)):
            yield slice(number * size, number * size + part.shape[-1]), part

    def dense(self) -> torch.Tensor:
        """`[1 or L, H, V]`."""
        return self.log_potential

    def shifted(self, by: torch.Tensor) -> DenseEmission:
        """With `by`, `[V]` or `[L, V]`, added."""
        by = by.to(self.dtype)
        return DenseEmission(self.log_potential + (by if by.ndim == 1 else by[:, None]))


@dataclass(frozen=True)
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

    @property
    def num_latents(self) -> int:
        return self.latents.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.bias.shape[0]

    def columns(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`log E(., v)`, `[..., H]`, of tokens `[...]`."""
        return F.embedding(tokens, self.embedding) @ self.latents.T + self.bias[tokens][..., None]

    def rows(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`log E(z, .)`, `[..., V]`, of latents `[...]`."""
        return self.latents[latents] @ self.embedding.T + self.bias

    def chunks(self, size: int, position: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the vocabulary and their `log E [H, n]`."""
        parts = zip(self.embedding.split(size), self.bias.split(size), strict=True)
        for number, (embedding, bias) in enumerate(parts):
            part = slice(number * size, number * size + len(bias))
            yield part, self.latents @ embedding.T + bias

    def dense(self) -> torch.Tensor:
        """`[1, H, V]`."""
        return (self.latents @ self.embedding.T + self.bias)[None]

    def shifted(self, by: torch.Tensor) -> TiedEmission:
        """With `by [V]` added."""
        return TiedEmission(self.latents, self.embedding, self.bias + by.to(self.dtype))


def stored_by_latent(emission: Emission) -> bool:
    """Whether a tied matrix has a state's tokens, not a token's states, side by side."""
    is_matrix = isinstance(emission, DenseEmission) and emission.num_positions == 1
    return is_matrix and emission.log_potential.stride(-1) == 1


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
    weights = (weights if weights.ndim == 1 else weights.mean(0)).double()
    bias = target.mean(0)
    weighted = embedding.T * weights
    size = len(weighted)
    gram = weighted @ embedding
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    map_ = torch.linalg.solve(gram, weighted @ (target - bias).T).T  # [H, d]
    # The best rank-r map in the metric in which errors are counted.
    root = torch.linalg.cholesky(gram)
    left, scale, right = torch.linalg.svd(map_ @ root, full_matrices=False)
    kept = min(rank, len(scale))
    latents = target.new_zeros(len(target), rank)
    projection = target.new_zeros(rank, size)
    latents[:, :kept] = left[:, :kept] * scale[:kept].sqrt()
    projection[:kept] = torch.linalg.solve_triangular(
        root, scale[:kept, None].sqrt() * right[:kept], upper=False, left=False
    )
    return latents, projection, bias
