"""Control of a draw by the text so far: repetition penalty and processors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..checks.arguments import as_tensor

PROCESSOR = "transformers' processors, or a function of ids and scores"


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


def controlled(
    scores: torch.Tensor,
    rows: torch.Tensor,
    text: RowText,
    repetition_penalty: float,
    processor: LogitsProcessor | LogitsProcessorList | None,
) -> torch.Tensor:
    """Scores `[n, vocab]` after all controls, before temperature.

    Args:
        scores: `[n, vocab]` log-probabilities.
        rows: `[n]`, the row of `text` that each line belongs to, in order.
        text: the rows.
        repetition_penalty: as transformers' `RepetitionPenaltyLogitsProcessor`, on
            log-probabilities; 1 changes nothing.
        processor: is called for each row, with the row's known tokens in order as `input_ids`, the
            same in every line, and a line of scores for each position.

    Raises:
        TypeError: the processor returns no scores.
        ValueError: it returns scores of another shape.
    """
    if repetition_penalty != 1:
        at = text.known.nonzero(as_tuple=True)
        seen = torch.zeros(len(text.tokens), scores.shape[-1], dtype=torch.bool)
        seen = seen.to(scores.device)
        seen[at[0], text.tokens[at]] = True
        penalised = torch.where(
            scores < 0, scores * repetition_penalty, scores / repetition_penalty
        )
        scores = torch.where(seen[rows], penalised, scores)
    for row in rows.unique().tolist() if processor else ():
        lines = rows == row
        ids = text.tokens[row, text.known[row]].expand(int(lines.sum()), -1)
        processed = processor(ids, scores[lines])
        processed = as_tensor("scores` of `logits_processor", processed, float, scores[lines].shape)
        scores = scores.masked_scatter(lines[:, None], processed.to(scores))
    return scores
