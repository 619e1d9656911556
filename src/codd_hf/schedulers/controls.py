"""Control of what is drawn by what the text already holds: repetition penalty and processors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..checks.arguments import as_tensor, check_callable
from .settings import DrawSettings

PROCESSOR = "transformers' processors, or a function of ids and scores"
RETURNED = "scores` of `logits_processor"


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

    def ids(self, row: int) -> torch.Tensor:
        """`[n]`: the known tokens of a row, in order."""
        return self.tokens[row, self.known[row]]

    def reveal(self, sample: torch.Tensor, where: torch.Tensor) -> RowText:
        """The same with tokens `[batch, length]` known `where` (bool) they were masked."""
        rows, columns = where.nonzero(as_tuple=True)
        place = rows, self.position[rows, columns]
        tokens = self.tokens.index_put(place, sample[rows, columns])
        known = self.known.index_put(place, torch.ones_like(rows, dtype=torch.bool))
        return replace(self, tokens=tokens, known=known)


@dataclass(frozen=True)
class Controls:
    """What changes the log-probabilities of candidates before temperature, top-k and top-p.

    Attributes:
        repetition_penalty: as transformers' `RepetitionPenaltyLogitsProcessor`, on
            log-probabilities; 1 changes nothing.
        processor: transformers' processors; None for none. One is called for each row, with the
            row's known tokens in order (masks and padding left out) as `input_ids`, the same in
            every line, and a line of scores for each position.
    """

    repetition_penalty: float = 1.0
    processor: LogitsProcessor | LogitsProcessorList | None = None

    @classmethod
    def of(
        cls, settings: DrawSettings, processor: LogitsProcessor | LogitsProcessorList | None
    ) -> Controls:
        """Raises a TypeError for a processor that cannot be called."""
        check_callable("logits_processor", processor, PROCESSOR)
        return cls(settings.repetition_penalty, processor)

    @property
    def change_nothing(self) -> bool:
        return self.repetition_penalty == 1 and not self.processor

    def apply(self, scores: torch.Tensor, rows: torch.Tensor, text: RowText) -> torch.Tensor:
        """Scores `[n, vocab]` after all controls.

        Args:
            scores: `[n, vocab]` log-probabilities.
            rows: `[n]` the row of `text` that each line belongs to, in order.
            text: what the rows hold.

        Raises:
            TypeError: the processor returns no scores.
            ValueError: it returns scores of another shape.
        """
        if self.repetition_penalty != 1:
            at = text.known.nonzero(as_tuple=True)
            seen = torch.zeros(
                len(text.tokens), scores.shape[-1], dtype=torch.bool, device=scores.device
            )
            seen[at[0], text.tokens[at]] = True
            penalised = torch.where(
                scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
            )
            scores = torch.where(seen[rows], penalised, scores)
        if self.processor:
            parts = []
            for row in rows.unique_consecutive().tolist():
                own = scores[rows == row]
                ids = text.ids(row).expand(len(own), -1)
                processed = as_tensor(RETURNED, self.processor(ids, own), float, own.shape)
                parts.append(processed.to(own))
            scores = torch.cat(parts) if parts else scores
        return scores
