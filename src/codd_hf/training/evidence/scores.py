"""Likelihoods of noised windows, and their means."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..processes.summing import summed, summing_dtype

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the noise levels that gains are told for."""


@dataclass
class WindowScores:
    """Likelihoods of `N` noised windows.

    Attributes:
        level: `[N]`, the probability with which a window's tokens were masked.
        masked: `[N]`, how many were.
        gain: `[N]`, nats that the circuit adds: `log p_w(x) - log Z`.
        factorized: `[N]`, nats of the masked tokens without the circuit; zero where the backbone is
            frozen and not at hand.
    """

    level: torch.Tensor
    masked: torch.Tensor
    gain: torch.Tensor
    factorized: torch.Tensor

    @property
    def log_prob(self) -> torch.Tensor:
        """`[N]`, nats of the masked tokens."""
        return self.factorized + self.gain

    def gains(self) -> dict[str, float]:
        """Mean gain in nats per masked token, of all windows and of each range of levels."""
        result = {"gain": (self.gain.sum() / self.masked.sum()).item()}
        for low, high in itertools.pairwise(LEVELS):
            inside = (self.level >= low) & ((self.level < high) | (high == LEVELS[-1]))
            count = self.masked[inside].sum().clamp(min=1)
            result[f"gain_{low:.2f}-{high:.2f}"] = (self.gain[inside].sum() / count).item()
        return result

    def summary(self) -> dict[str, float]:
        """Nats per masked token, factorized and coupled; their difference, all and by level."""
        total = self.masked.sum()
        nats = {
            "factorized_nats": -(self.factorized.sum() / total).item(),
            "coupled_nats": -(self.log_prob.sum() / total).item(),
        }
        return nats | self.gains()


@torch.no_grad()
def score_all(
    chunks: Sequence[torch.Tensor],
    score: Callable[[int, torch.Tensor], WindowScores],
    device: torch.device,
) -> WindowScores:
    """Scores of all windows, whose rows the processes share in chunks; all get the result."""
    total = sum(map(len, chunks))

    def placed(number: int, rows: torch.Tensor) -> list[torch.Tensor]:
        part = score(number, rows)
        columns = (part.level, part.masked, part.gain, part.factorized)
        table = torch.zeros(4, total, dtype=summing_dtype(device), device=device)
        table[:, rows.to(device)] = torch.stack([column.to(table) for column in columns])
        return [table]

    (table,) = summed([torch.Size((4, total))], chunks, placed, device)
    return WindowScores(*table.cpu())
