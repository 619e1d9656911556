"""`CoDDModel.score`: how likely answers are, given their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..checks.arguments import (
    check_callable,
    check_unmasked,
    integer,
    rows_of_ids,
    several,
    shown,
    token_id,
)
from ..text.encoding import encode_as_written
from .windows import check_size

if TYPE_CHECKING:
    from ..modeling_codd import CoDDModel
    from .heads import CallHead, HeadName

Texts = Sequence[str] | Sequence[Sequence[int]]


@dataclass
class ScoreOutput(ModelOutput):
    """Output of [`CoDDModel.score`], one entry per prompt and answer.

    Attributes:
        factorized: `[batch]`, log-likelihood of the answer, in nats, without the head.
        coupled: `[batch]`, the same with the head; without one, equal to `factorized`.
        num_tokens: `[batch]`, number of tokens of the answer.
    """

    factorized: torch.Tensor | None = None
    coupled: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


@torch.no_grad()
def score(
    model: CoDDModel,
    prompts: Texts,
    answers: Texts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    head: HeadName = None,
) -> ScoreOutput:
    """Log-likelihoods of answers given their prompts, factorized and coupled.

    An answer is cut into the head's windows, from its first token on. Each window is predicted in
    one parallel step, with the windows before it visible and those after it masked, as block
    decoding meets it; the sum over the windows is by the chain rule the likelihood of the answer.
    The number of tokens of the answer is taken as given.

    Args:
        model: a backbone with a head (or without one).
        prompts: texts, or token ids in lists, arrays or tensors, of which padding is left out; a
            prompt may be empty.
        answers: as many, none of them empty.
        tokenizer: for texts, which are tokenised without special tokens of their own.
        batch_size: windows at once.
        head: the name of the head; None, the model's default; False, none.

    Raises:
        ValueError: prompts and answers do not pair up, an answer is empty, a row holds what is no
            token or the mask token, or is longer than the backbone's positions, or texts are given
            without a tokenizer.
        TypeError: an argument is of another kind.
    """
    if model.config.mask_token_id is None:
        raise ValueError("`mask_token_id` is not known: give it to `from_backbone`.")
    token_id("mask_token_id", model.config.mask_token_id, model.config.vocab_size)
    batch_size = integer("batch_size", batch_size, least=1)
    check_callable("tokenizer", tokenizer, "a tokenizer")
    rows = {
        name: _tokens(model, name, texts, tokenizer)
        for name, texts in (("prompts", prompts), ("answers", answers))
    }
    counts = len(rows["prompts"]), len(rows["answers"])
    if counts[0] != counts[1] or counts[0] == 0:
        raise ValueError(
            f"`prompts` and `answers` must be of the same, positive length, got {counts[0]} and "
            f"{counts[1]}."
        )
    pairs = list(zip(rows["prompts"], rows["answers"], strict=True))
    for row, (prompt, answer) in enumerate(pairs):
        if not answer:
            raise ValueError(
                f"`answers` must hold at least one token each, got none in row {row}: leave empty "
                "ones out."
            )
        what = f"In row {row} of `prompts` and `answers`, {len(prompt)} and {len(answer)} tokens"
        check_size(model.max_positions, len(prompt) + len(answer), what)
    head = model.head_of_call(head)
    length = head.window_length
    windows = [
        (row, start)
        for row, (_, answer) in enumerate(pairs)
        for start in range(0, len(answer), length)
    ]
    totals = torch.zeros(2, len(pairs), dtype=torch.float64)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        rows = torch.tensor([row for row, _ in batch])
        totals.index_add_(1, rows, _score_windows(model, head, pairs, batch).double().cpu())
    num_tokens = torch.tensor([len(answer) for _, answer in pairs])
    return ScoreOutput(factorized=totals[0], coupled=totals[1], num_tokens=num_tokens)


def _tokens(
    model: CoDDModel, name: str, texts: Any, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """The tokens of each text, without padding."""
    rows = several(texts)
    if rows is None:
        raise TypeError(f"`{name}` must be a list of texts or of token ids, got {shown(texts)}.")
    if tokenizer is None and any(isinstance(row, str) for row in rows):
        raise ValueError(f"`{name}` are texts: give a `tokenizer`, or token ids.")
    if tokenizer is not None:
        texts = [row if isinstance(row, str) else "" for row in rows]
        encoded = encode_as_written(name, texts, tokenizer, add_special_tokens=False)
        rows = [e if isinstance(r, str) else r for e, r in zip(encoded, rows, strict=True)]
    ids = model.unpadded(rows_of_ids(name, rows, model.config.vocab_size))
    check_unmasked(name, ids, model.config.mask_token_id)
    return [row.tolist() for row in ids]


def _score_windows(
    model: CoDDModel, head: CallHead, pairs, batch: list[tuple[int, int]]
) -> torch.Tensor:
    """Log-likelihoods `[2, batch]` of single windows, factorized and coupled."""
    size = max(len(pairs[row][0]) + len(pairs[row][1]) for row, _ in batch)
    truth = torch.zeros(len(batch), size, dtype=torch.long)
    attention_mask = torch.zeros_like(truth)
    starts = torch.tensor([len(pairs[row][0]) + start for row, start in batch])
    for i, (row, _) in enumerate(batch):
        tokens = torch.tensor(pairs[row][0] + pairs[row][1])
        truth[i, : len(tokens)] = tokens
        attention_mask[i, : len(tokens)] = 1
    hidden = (torch.arange(size) >= starts[:, None]) & attention_mask.bool()
    device = model.device
    ids = truth.masked_fill(hidden, model.config.mask_token_id).to(device)
    attention_mask, starts = attention_mask.to(device), starts.to(device)
    columns = starts[:, None] + torch.arange(head.window_length, device=device)
    targets = truth.to(device).gather(1, columns.clamp(max=size - 1))
    with model.adapter_of_call(head):
        states = model.backbone_states(ids, attention_mask)
        return torch.stack(
            [
                model.window_distribution(
                    states, ids, starts, attention_mask, head=coupled_by
                ).log_prob(targets)
                for coupled_by in (head._replace(module=None), head)
            ]
        )
