"""Data without end: the package's own tasks, in batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from transformers import PreTrainedTokenizerBase

from ..data.canvases import TokenizedExample, tokenize_examples
from ..data.sources import Example
from ..data.tasks import draw_tasks, kind_names

STRETCH = 16
"""Batches that are drawn together, so that tasks of like length share one."""
DRAWN = 256
"""Tasks that are tokenized at once."""


@dataclass(frozen=True)
class TaskStream:
    """Training tasks without end.

    A batch is a pure function of the arguments and its number, so that a run that goes on reads
    what it would have read.

    Args:
        tokenizer: of the tasks.
        kinds: names of kinds with commas between; default, all.
        max_length: tokens of an example; longer ones are passed over.
    """

    tokenizer: PreTrainedTokenizerBase
    kinds: str | None = None
    max_length: int | None = None

    def beginning(self) -> list[TokenizedExample]:
        """A few of the tasks, which tell this stream from another one."""
        return list(islice(self._drawn("beginning"), DRAWN))

    def batches(
        self, tokens_per_batch: int, window_length: int, seed: int, first_batch: int = 0
    ) -> Iterator[list[TokenizedExample]]:
        """Batches of about `tokens_per_batch` tokens, answers counted in whole windows.

        Args:
            tokens_per_batch: the size; no batch is empty.
            window_length: of the answers' windows.
            seed: of tasks and order.
            first_batch: how many are skipped, at no cost.
        """
        stretch, skipped = divmod(first_batch, STRETCH)
        while True:
            yield from self._stretch(tokens_per_batch, window_length, f"{seed} {stretch}")[skipped:]
            stretch, skipped = stretch + 1, 0

    def _stretch(self, size: int, window_length: int, seed: str) -> list[list[TokenizedExample]]:
        """`STRETCH` batches of equally many tokens, in random order."""

        def length(example: TokenizedExample) -> int:
            windows = -(-len(example.answer_ids) // window_length)
            return len(example.prompt_ids) + windows * window_length

        examples: list[TokenizedExample] = []
        total, longest = 0, 1
        for example in self._drawn(seed):
            examples.append(example)
            total, longest = total + length(example), max(longest, length(example))
            if total >= STRETCH * max(size, longest):  # so that no batch is empty
                break
        batches: list[list[TokenizedExample]] = [[] for _ in range(STRETCH)]
        before = 0
        for example in sorted(examples, key=length):
            batches[before * STRETCH // total].append(example)
            before += length(example)
        Random(f"{seed} order").shuffle(batches)
        return batches

    def _drawn(self, seed: str) -> Iterator[TokenizedExample]:
        tasks = draw_tasks("train", f"stream {seed}", kind_names(self.kinds))
        longest = sys.maxsize if self.max_length is None else self.max_length
        while True:
            some = [Example(t.question, t.answer) for t in islice(tasks, DRAWN)]
            for example in tokenize_examples(some, self.tokenizer, None):
                if len(example.prompt_ids) + len(example.answer_ids) <= longest:
                    yield example
