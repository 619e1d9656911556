"""`CoDDModel.score`: how likely answers are, given their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..checks.arguments import check_unmasked, integer, rows_of_ids, several, shown
from ..text.encoding import encode_as_written
from .heads import HeadName
from .windows import CoupledBackbone, Stretch, check_size, stretch_at

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
    model: CoupledBackbone,
    prompts: Texts,
    answers: Texts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    evidence_temperature: float | None = None,
    head: HeadName = None,
) -> ScoreOutput:
    """Log-likelihoods of answers given their prompts, factorized and coupled.

    An answer is cut into the head's windows, from its first token on, and of a block-causal
    backbone these into its blocks (`stretch_at`). Each is predicted in one parallel step, with all
    before it visible and what follows masked, as block decoding meets it; the sum is by the chain
    rule the likelihood of the answer. The number of tokens of the answer is taken as given.

    Args:
        model: a backbone with a head (or without one).
        prompts: texts, or token ids in lists, arrays or tensors, whose padding is left out; a
            prompt may be empty.
        answers: as many, none of them empty.
        tokenizer: for texts, which are tokenised without special tokens of their own.
        batch_size: windows, or blocks, at once.
        evidence_temperature: of the coupled likelihood; default, the head's. The factorized one is
            at temperature 1.
        head: the name of the head; None, the model's default; False, none.

    Raises:
        ValueError: prompts and answers do not pair up, or a row of them cannot be scored.
        TypeError: an argument is of another kind.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    given = _tokens(model, "prompts", prompts, tokenizer)
    wanted = _tokens(model, "answers", answers, tokenizer)
    if len(given) != len(wanted) or not given:
        raise ValueError(
            f"`prompts` and `answers` must be of the same, positive length, got {len(given)} and "
            f"{len(wanted)}."
        )
    call = model.head_of_call(head).frozen()
    device, length = model.device, call.window_length
    stretches: list[tuple[int, Stretch]] = []
    for row, (prompt, answer) in enumerate(zip(given, wanted, strict=True)):
        if not len(answer):
            raise ValueError(f"`answers` must hold at least one token each, got none in row {row}.")
        what = f"In row {row} of `prompts` and `answers`, {len(prompt)} and {len(answer)} tokens"
        check_size(model.max_positions, len(prompt) + len(answer), what)
        start, end = torch.tensor([len(prompt), len(prompt) + len(answer)])
        place = start
        while place < end:
            stretches.append((row, stretch_at(place, start, end, length, model.config.text_config)))
            place = stretches[-1][1].stop
    totals = torch.zeros(2, len(given), dtype=torch.float64)
    for first in range(0, len(stretches), batch_size):
        numbers, parts = zip(*stretches[first : first + batch_size], strict=True)
        rows = torch.tensor(numbers)
        starts, begins, _, ends = (
            torch.stack(part).to(device) for part in zip(*parts, strict=True)
        )
        texts = [torch.cat((given[row], wanted[row])) for row in rows]
        truth = pad_sequence(texts, batch_first=True).to(device)
        attention_mask = pad_sequence([torch.ones_like(t) for t in texts], True).to(device)
        column = torch.arange(truth.shape[1], device=device)
        hidden = (column >= begins[:, None]) & attention_mask.bool()
        attention_mask = attention_mask * (column < ends[:, None])
        ids = truth.masked_fill(hidden, model.mask_token_id)
        columns = starts[:, None] + torch.arange(length, device=device)
        targets = truth.gather(1, columns.clamp(max=truth.shape[1] - 1))
        with model.adapter_of_call(call):
            window = model.backbone_states(ids, attention_mask), ids, starts, attention_mask
            for total, temperature, coupled_by in (
                (totals[0], 1.0, call._replace(module=None)),
                (totals[1], evidence_temperature, call),
            ):
                distribution = model.window_distribution(
                    *window, temperature=temperature, head=coupled_by
                )
                total.index_add_(0, rows, distribution.log_prob(targets).double().cpu())
    num_tokens = torch.tensor([len(answer) for answer in wanted])
    return ScoreOutput(factorized=totals[0], coupled=totals[1], num_tokens=num_tokens)


def _tokens(
    model: CoupledBackbone, name: str, texts: Any, tokenizer: PreTrainedTokenizerBase | None
) -> list[torch.Tensor]:
    """The tokens of each text, `[length]`, without padding."""
    rows = several(texts)
    if rows is None:
        raise TypeError(f"`{name}` must be a list of texts or of token ids, got {shown(texts)}.")
    if rows and all(isinstance(row, str) for row in rows):
        if not callable(tokenizer):
            raise ValueError(
                f"`{name}` are texts: give a `tokenizer`, got {shown(tokenizer)}, or token ids."
            )
        rows = encode_as_written(name, rows, tokenizer, add_special_tokens=False)
    ids = model.unpadded(rows_of_ids(name, rows, model.config.vocab_size))
    check_unmasked(name, ids, model.config.mask_token_id)
    return [row.cpu() for row in ids]
