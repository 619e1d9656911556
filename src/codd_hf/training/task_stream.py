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

        No batch is empty, and the first ones are skipped at no cost.
        """
        stretch, skipped = divmod(first_batch, STRETCH)
        while True:
            yield from self._stretch(tokens_per_batch, window_length, f"{seed} {stretch}")[skipped:]
            stretch, skipped = stretch + 1, 0

    def _stretch(self, size: int, window_length: int, seed: str) -> list[list[TokenizedExample]]:
        """`STRETCH` batches of equally many tokens, in random order."""
        examples: list[TokenizedExample] = []
        total, longest = 0, 1
        for example in self._drawn(seed):
            examples.append(example)
            length = example.length(window_length)
            total, longest = total + length, max(longest, length)
            if total >= STRETCH * max(size, longest):  # so that no batch is empty
                break
        batches: list[list[TokenizedExample]] = [[] for _ in range(STRETCH)]
        before = 0
        for example in sorted(examples, key=lambda e: e.length(window_length)):
            batches[before * STRETCH // total].append(example)
            before += example.length(window_length)
        Random(f"{seed} order").shuffle(batches)
        return batches

    def _drawn(self, seed: str) -> Iterator[TokenizedExample]:
        tasks = draw_tasks("train", f"stream {seed}", kind_names(self.kinds))
        longest = sys.maxsize if self.max_length is None else self.max_length
        while True:
            some = [Example(t.question, t.answer) for t in islice(tasks, DRAWN)]
            for example in tokenize_examples(some, self.tokenizer, None):
                if example.length() <= longest:
                    yield example
