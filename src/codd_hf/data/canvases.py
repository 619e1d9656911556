"""From a data source to token canvases: prompt, answer, end-of-text fill, padding.

A canvas is what a diffusion LM denoises. Its answer part starts where decoding would start and is
filled with end-of-text tokens to a whole number of windows, so that a model learns to end, and
windows in training are cut exactly as decoding cuts them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice

import torch
from transformers import PreTrainedTokenizerBase

from ..text.encoding import encode_chats, encode_texts
from .sources import Example, RowReport, tell


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and the answer to learn, which ends with end-of-text."""

    prompt_ids: list[int]
    answer_ids: list[int]

    def length(self, window_length: int = 1, infill: bool = False) -> int:
        """Tokens of the prompt and of the answer, counted in whole windows; to infill, in one."""
        answer = len(self.answer_ids)
        windows = -(-answer // window_length) * window_length
        return len(self.prompt_ids) + (max(answer, window_length) if infill else windows)


@dataclass
class CanvasBatch:
    """Right-padded canvases.

    Attributes:
        input_ids: `[batch, length]` clean tokens.
        attention_mask: `[batch, length]`, 0 at padding.
        answer_start: `[batch]` index of the first generated token, where the windows begin.
        answer_end: `[batch]` index after the last position of the canvas.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_start: torch.Tensor
    answer_end: torch.Tensor

    def to(self, device: torch.device) -> CanvasBatch:
        """The same on a device."""
        return CanvasBatch(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = 512,
    *,
    packing: bool = False,
    never: Collection[int | None] = (),
    report: RowReport | None = None,
) -> list[TokenizedExample]:
    """Tokenizes with the chat template where there is one; answers end with end-of-text.

    Special tokens come from the template alone: a text that spells one is text. An example longer
    than `max_length` tokens loses the end of its answer (and its end-of-text); one whose prompt
    alone is that long is left out. Their numbers are printed.

    Args:
        examples: the examples.
        tokenizer: with an end-of-text token, and a chat template if there are messages.
        max_length: tokens of an example; None for any number.
        packing: join texts without prompts, end-of-text after each, and cut all of it into pieces
            of `max_length` tokens (the last one may be shorter).
        never: tokens that no answer may hold beside the mask token, such as that of unknown
            characters.
        report: takes examples that cannot be encoded; by default the first is an error.

    Raises:
        ValueError: the tokenizer lacks what is needed, an example cannot be encoded, nothing is
            left, or there is a prompt where texts are to be packed.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("`tokenizer` needs an `eos_token`, so that answers can end.")
    if packing and any(e.messages for e in examples):
        raise ValueError("`packing` is for plain text, but there are examples with a prompt.")
    report = report or RowReport("`examples`")
    max_length = sys.maxsize if max_length is None else max_length
    prompts, bad_prompts = _encode_prompts(examples, tokenizer, eos)
    answers, bad_answers = encode_texts([e.answer for e in examples], tokenizer)
    faults = {i: f"has an answer that {fault}" for i, fault in bad_answers.items()}
    faults |= {i: f"has a prompt that {fault}" for i, fault in bad_prompts.items()}
    refused = {tokenizer.mask_token_id, *never} - {eos, None}
    tokenized, cut = [], 0
    for i, (example, prompt, answer) in enumerate(zip(examples, prompts, answers, strict=True)):
        if outside := refused.intersection(answer):
            name = tokenizer.convert_ids_to_tokens(min(outside))
            faults[i] = f"has an answer with the token {name!r}, which is never generated"
        number, room = example.row or i + 1, sys.maxsize if packing else max_length - len(prompt)
        if i in faults:
            report.refuse(number, faults[i])
        elif not answer:
            report.pass_over(number, "an answer without a token")
        elif room <= 0:
            report.pass_over(number, f"a prompt that fills `max_length` ({max_length} tokens)")
        else:
            cut += len(answer) >= room
            tokenized.append(TokenizedExample(prompt, [*answer, eos][:room]))
    tell(report)
    if examples and not tokenized:
        raise ValueError(f"Nothing is left of {report.source}. {report}")
    if cut:
        tell(
            f"Of {len(examples)} examples, {cut} lose the end of their answer to `max_length` "
            f"({max_length} tokens)."
        )
    if not packing:
        return tokenized
    joined = [token for piece in tokenized for token in piece.answer_ids]
    starts = range(0, len(joined), max_length)
    return [TokenizedExample([], joined[start : start + max_length]) for start in starts]


def _encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, eos: int
) -> tuple[list[list[int]], dict[int, str]]:
    """The prompts, in the chat template where there is one; as `encode_texts`.

    Without a template, that of a text without one is what the tokenizer begins a text with.
    """
    given = [i for i, example in enumerate(examples) if example.messages]
    if tokenizer.chat_template is not None:
        chats = [examples[i].messages for i in given]
        encoded, bad = encode_chats(chats, tokenizer, add_generation_prompt=True)
    elif any(e.history for e in examples):
        raise ValueError(
            "`tokenizer` needs a chat template for messages: set `tokenizer.chat_template`, or "
            "use a prompt column and an answer column."
        )
    else:
        prompts = [example.prompt for example in examples]
        rows, bad = encode_texts(prompts, tokenizer, add_special_tokens=True)
        for row, example in zip(rows, examples, strict=True):
            if not example.prompt and eos in row:
                del row[row.index(eos) :]
        return rows, bad
    found = dict(zip(given, encoded, strict=True))
    rows = [found.get(i, []) for i in range(len(examples))]
    return rows, {given[i]: fault for i, fault in bad.items()}


def collate(
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    window_length: int,
    extra_windows: Sequence[int] | None = None,
    infill: bool = False,
) -> CanvasBatch:
    """Lays examples out as canvases: an answer is filled with end-of-text to whole windows.

    `extra_windows` of end-of-text follow in each row: a model should not learn that the canvas's
    length gives the answer's length away. To `infill`, only answers shorter than a window are
    filled, since templates end where they end. End-of-text pads rows where there is no padding
    token.
    """
    eos, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    more = torch.tensor(extra_windows or [0] * len(examples)) * window_length
    end = torch.tensor([example.length(window_length, infill) for example in examples]) + more
    columns = torch.arange(int(end.max()))
    input_ids = torch.full((len(examples), len(columns)), eos)
    for row, example in enumerate(examples):
        ids = torch.tensor([*example.prompt_ids, *example.answer_ids])
        input_ids[row, : len(ids)] = ids
    present = columns < end[:, None]
    input_ids.masked_fill_(~present, eos if padding is None else padding)
    start = torch.tensor([len(example.prompt_ids) for example in examples])
    return CanvasBatch(input_ids, present.long(), start, end)


def epoch_batches(
    lengths: Sequence[int], tokens_per_batch: int, seed: int, epoch: int = 0
) -> list[list[int]]:
    """Batches of example indices that hold each example once, in an order of the epoch's own.

    Within stretches of a permutation, examples of like length share a batch: little is padded.
    """
    of_example = torch.as_tensor(lengths)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches: list[list[int]] = []
    for stretch in torch.randperm(len(of_example), generator=generator).split(2048):
        batch: list[int] = []
        for index in stretch[of_example[stretch].argsort(stable=True)].tolist():
            if batch and (len(batch) + 1) * int(of_example[index]) > tokens_per_batch:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def batch_indices(
    lengths: Sequence[int], tokens_per_batch: int, seed: int, first_batch: int = 0
) -> Iterator[list[int]]:
    """The batches of one epoch after the other, without end, from the `first_batch` on."""
    epochs = (epoch_batches(lengths, tokens_per_batch, seed, epoch) for epoch in count())
    return islice(chain.from_iterable(epochs), first_batch, None)
