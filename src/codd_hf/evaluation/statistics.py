"""Figures of texts, each with a standard error over the texts.

The errors are the jackknife's: a figure is computed again without each text in turn, which holds
for means, ratios and entropies of pooled tokens alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A figure of `n` texts; formatted, it stands with its error (`f"{x:.1f}"`: 3.0 ± 0.2).

    Attributes:
        value: of all of them.
        left_out: `[n]` float64, without each of them.
    """

    value: float
    left_out: torch.Tensor

    @property
    def error(self) -> float | None:
        """The jackknife's standard error; None for a single text."""
        n = len(self.left_out)
        squares = (self.left_out - self.left_out.mean()).square().sum().item()
        return math.sqrt(squares * (n - 1) / n) if n > 1 else None

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two figures of paired texts."""
        return Estimate(self.value - other.value, self.left_out - other.left_out)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.left_out * factor)

    def __format__(self, spec: str) -> str:
        error = "" if self.error is None else f" ± {self.error:{spec.removeprefix('+')}}"
        return f"{self.value:{spec}}{error}"


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Estimate:
    """`sum(parts) / sum(wholes)`, where each text gives a part and a whole; 0 where all is 0."""
    part = torch.as_tensor(parts, dtype=torch.float64)
    whole = torch.as_tensor(wholes, dtype=torch.float64)
    smallest = torch.finfo(torch.float64).tiny
    left_out = (part.sum() - part) / (whole.sum() - whole).clamp(min=smallest)
    return Estimate((part.sum() / whole.sum().clamp(min=smallest)).item(), left_out)


def mean(values: Sequence[float]) -> Estimate:
    """The mean over texts."""
    return ratio(values, [1.0] * len(values))


def ngrams(tokens: Sequence, size: int) -> list[tuple]:
    """The runs of `size` neighbours."""
    return list(zip(*(tokens[i:] for i in range(size)), strict=False))


def entropy(texts: Sequence[Sequence[int]], size: int = 1) -> Estimate:
    """Entropy, in nats, of the n-grams of `size` tokens of all texts thrown together."""
    columns: dict[tuple, int] = {}
    places = [
        (row, columns.setdefault(gram, len(columns)))
        for row, tokens in enumerate(texts)
        for gram in ngrams(tokens, size)
    ]
    counts = torch.zeros(len(texts), max(len(columns), 1), dtype=torch.float64)
    index = torch.tensor(places, dtype=torch.long).view(-1, 2).unbind(1)
    counts.index_put_(index, torch.ones(len(places), dtype=torch.float64), accumulate=True)
    total = counts.sum(0)
    return Estimate(_entropy(total).item(), _entropy(total - counts))


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(counts / counts.sum(-1, keepdim=True).clamp(min=1)).sum(-1)


def repeated_ngrams(texts: Sequence[Sequence[int]], size: int = 3) -> Estimate:
    """Share of the n-grams that have occurred before in the same text."""
    grams = [ngrams(tokens, size) for tokens in texts]
    return ratio([len(g) - len(set(g)) for g in grams], [len(g) for g in grams])
