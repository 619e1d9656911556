"""From a data source to token canvases: prompt, answer, end-of-text fill, padding.

A canvas is what a diffusion LM denoises. Its answer part starts where decoding would start and is
filled with end-of-text tokens to a whole number of windows, so that a model learns to end, and
windows in training are cut exactly as decoding cuts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Example:
    """One text to learn: `answer` is generated, `prompt` (may be empty) is given."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class TokenizedExample:
    """`prompt_ids` are given; `answer_ids` end with end-of-text."""

    prompt_ids: list[int]
    answer_ids: list[int]


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
        return CanvasBatch(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


def load_examples(
    source: str,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    remove_pattern: str | None = None,
    split: str = "train",
) -> list[Example]:
    """Reads a JSONL, Parquet or text file, or a dataset of the Hub.

    Args:
        source: a path that ends in .jsonl, .json, .parquet or .txt, or a Hub dataset id.
        prompt_column: the column that is given; without it texts have no prompt.
        answer_column: the column that is generated; found by its usual name if not given.
        remove_pattern: a regular expression whose matches are deleted from both columns.
        split: the split of a Hub dataset.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file cannot be read, a column is missing or no text, or nothing is left.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(source).suffix
    if suffix in FILE_FORMATS:
        if not Path(source).is_file():
            raise FileNotFoundError(f"`source`: there is no file {source!r}.")
        try:
            table = load_dataset(FILE_FORMATS[suffix], data_files=str(source), split="train")
        except DatasetGenerationError as error:
            raise ValueError(f"`source` {source!r} cannot be read: {error.__cause__}") from error
    else:
        table = load_dataset(source, split=split)
    columns = table.column_names
    if answer_column is None:
        answer_column = next((c for c in ("answer", "completion", "text") if c in columns), None)
        if answer_column is None:
            raise ValueError(
                f"`answer_column` must be given: none of answer, completion, text is among the "
                f"columns {columns} of {source!r}."
            )
        if prompt_column is None and answer_column != "text":
            prompt_column = next((c for c in ("question", "prompt") if c in columns), None)
    for name, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column is not None and column not in columns:
            raise ValueError(
                f"`{name}` is {column!r}, but the columns of {source!r} are {columns}."
            )

    def clean(text: str) -> str:
        return re.sub(remove_pattern, "", text) if remove_pattern else text

    answers = table[answer_column]
    prompts = table[prompt_column] if prompt_column else [""] * len(table)
    for column, texts in ((prompt_column, prompts), (answer_column, answers)):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"Column {column!r} of {source!r} must hold a text in every row.")
    examples = [
        Example(clean(p), clean(a)) for p, a in zip(prompts, answers, strict=True) if a.strip()
    ]
    if not examples:
        raise ValueError(f"`source` {source!r} has no text in column {answer_column!r}.")
    return examples


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> list[TokenizedExample]:
    """Tokenizes with the chat template where there is one; answers end with end-of-text.

    An example longer than `max_length` tokens loses the end of its answer (and its end-of-text);
    one whose prompt alone is that long is left out.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` needs an `eos_token`, so that answers can end.")
    prompts = [encode_prompt(e.prompt, tokenizer) for e in examples]
    answers = tokenizer([e.answer for e in examples], add_special_tokens=False)["input_ids"]
    tokenized = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompt) < max_length:
            room = max_length - len(prompt)
            tokenized.append(TokenizedExample(prompt, [*answer, tokenizer.eos_token_id][:room]))
    return tokenized


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a user's prompt, in the chat template where there is one."""
    if not prompt:
        return []
    if tokenizer.chat_template is None:
        return tokenizer(prompt, add_special_tokens=True)["input_ids"]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]


def collate(
    examples: Sequence[TokenizedExample],
    *,
    window_length: int,
    eos_token_id: int,
    pad_token_id: int,
    extra_windows: Sequence[int] | None = None,
) -> CanvasBatch:
    """Lays examples out as canvases.

    Args:
        examples: the examples, one a row.
        window_length: the answer part is filled to a multiple of it.
        eos_token_id: fills the answer part.
        pad_token_id: fills rows to the batch's longest.
        extra_windows: per row, how many windows of end-of-text follow (a model should not learn
            that the canvas's length gives the answer's length away).
    """
    extra_windows = extra_windows or [0] * len(examples)
    starts = [len(e.prompt_ids) for e in examples]
    spans = [
        (-(-len(e.answer_ids) // window_length) + extra) * window_length
        for e, extra in zip(examples, extra_windows, strict=True)
    ]
    length = max(s + n for s, n in zip(starts, spans, strict=True))
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, (example, span) in enumerate(zip(examples, spans, strict=True)):
        fill = [eos_token_id] * (span - len(example.answer_ids))
        ids = [*example.prompt_ids, *example.answer_ids, *fill]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    start = torch.tensor(starts)
    return CanvasBatch(input_ids, attention_mask, start, start + torch.tensor(spans))


def batch_indices(
    lengths: Sequence[int], tokens_per_batch: int, seed: int, first_batch: int = 0
) -> Iterator[list[int]]:
    """Endless batches of example indices, a pure function of `seed` and the batch's number.

    Every epoch is a new permutation; within stretches of it, examples of like length share a batch,
    so that little is padded. `first_batch` skips ahead, which makes a run resumable by its step.
    """
    lengths = torch.as_tensor(lengths)
    number, epoch = 0, 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(lengths), generator=generator)
        batches: list[list[int]] = []
        for stretch in order.split(2048):
            stretch = stretch[lengths[stretch].argsort(stable=True)]
            batch: list[int] = []
            for index in stretch.tolist():
                if batch and (len(batch) + 1) * int(lengths[index]) > tokens_per_batch:
                    batches.append(batch)
                    batch = []
                batch.append(index)
            batches.append(batch)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            if number >= first_batch:
                yield batches[i]
            number += 1
        epoch += 1
