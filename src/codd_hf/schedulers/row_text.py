"""The text that processors of a draw look at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RowText:
    """The rows that a step works on, whole, of which its `sample` may be a part.

    Attributes:
        tokens: `[batch, T]`.
        known: `[batch, T]` bool, prompt and committed tokens; not masks, not padding.
        position: `[batch, length]`, where on `tokens` the positions of `sample` lie; of use where
            they are masked.
    """

    tokens: torch.Tensor
    known: torch.Tensor
    position: torch.Tensor

    def reveal(self, sample: torch.Tensor, where: torch.Tensor) -> RowText:
        """The same with tokens `[batch, length]` known `where` (bool) they were masked."""
        rows, columns = where.nonzero(as_tuple=True)
        place = rows, self.position[rows, columns]
        tokens = self.tokens.index_put(place, sample[rows, columns])
        known = self.known.index_put(place, torch.ones_like(rows, dtype=torch.bool))
        return replace(self, tokens=tokens, known=known)
