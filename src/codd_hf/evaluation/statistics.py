"""Figures of texts, each with a standard error over the texts.

The errors are the jackknife's: a figure is computed again without each text in turn, which holds
for means, ratios and entropies of pooled tokens alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Values = Sequence[float] | torch.Tensor


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

    def __format__(self, spec: str) -> str:
        error = "" if self.error is None else f" ± {self.error:{spec.removeprefix('+')}}"
        return f"{self.value:{spec}}{error}"

    def __str__(self) -> str:
        return format(self, ".3f")

    def as_dict(self) -> dict[str, Any]:
        """Value and error, for JSON."""
        return {"value": self.value, "error": self.error}


def ratio(parts: Values, wholes: Values) -> Estimate:
    """`sum(parts) / sum(wholes)`, where each text gives a part and a whole; 0 where all is 0."""
    part = torch.as_tensor(parts, dtype=torch.float64)
    whole = torch.as_tensor(wholes, dtype=torch.float64)
    smallest = torch.finfo(torch.float64).tiny
    left_out = (part.sum() - part) / (whole.sum() - whole).clamp(min=smallest)
    return Estimate((part.sum() / whole.sum().clamp(min=smallest)).item(), left_out)


def mean(values: Values) -> Estimate:
    """The mean over texts."""
    return ratio(values, [1.0] * len(values))


def entropy(texts: Sequence[Sequence[int]]) -> Estimate:
    """Entropy, in nats, of the tokens of all texts thrown together."""
    tokens = torch.tensor([token for text in texts for token in text], dtype=torch.long)
    rows = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(t) for t in texts]))
    kinds, columns = tokens.unique(return_inverse=True)
    counts = torch.zeros(len(texts), len(kinds), dtype=torch.float64)
    counts.index_put_((rows, columns), torch.ones(len(tokens), dtype=torch.float64), True)
    total = counts.sum(0)
    return Estimate(_entropy(total).item(), _entropy(total - counts))


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(counts / counts.sum(-1, keepdim=True).clamp(min=1)).sum(-1)


def repeated_ngrams(texts: Sequence[Sequence[int]], size: int = 3) -> Estimate:
    """Percentage of the n-grams that have occurred before in the same text."""
    grams = [list(zip(*(text[i:] for i in range(size)), strict=False)) for text in texts]
    return ratio([100 * (len(g) - len(set(g))) for g in grams], [len(g) for g in grams])
