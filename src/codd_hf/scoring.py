"""`CoDDModel.score`: how likely answers are, given their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from .heads import CallHead, HeadName
    from .modeling_codd import CoDDModel

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
        prompts: texts, or lists of token ids; a prompt may be empty.
        answers: as many texts or lists of token ids, none of them empty.
        tokenizer: for texts, which are tokenised without special tokens of their own.
        batch_size: windows at once.
        head: the name of the head; None, the model's default; False, none.

    Raises:
        ValueError: prompts and answers do not pair up, one of the answers is empty, or texts are
            given without a tokenizer.
    """
    if len(prompts) != len(answers) or len(prompts) == 0:
        raise ValueError(
            f"`prompts` and `answers` must be of the same, positive length, got {len(prompts)} and "
            f"{len(answers)}."
        )
    pairs = [
        (_ids("prompts", prompt, tokenizer), _ids("answers", answer, tokenizer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    if not all(answer for _, answer in pairs):
        raise ValueError("`answers` must hold at least one token each: leave empty ones out.")
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


def _ids(name: str, text, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if not isinstance(text, str):
        return [int(token) for token in text]
    if tokenizer is None:
        raise ValueError(f"`{name}` are texts: give a `tokenizer`, or token ids.")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
