"""Answers that a pipeline gives to fixed questions under some settings, judged and kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ..data.fingerprint import (
    json_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from ..data.sources import Example
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.journal import append_results, read_results
from ..text.encoding import encode_texts
from .judge import Judge
from .settings import AnswerSettings


@dataclass(frozen=True)
class Answers:
    """One answer to each question, without end-of-text, and the judge's verdicts.

    Attributes:
        passes: backbone passes that each took part in; 0 for texts that were not generated.
        seconds: that generation took.
    """

    texts: list[str]
    tokens: list[list[int]]
    passes: list[int]
    verdicts: list[Any]
    seconds: float


def pipeline_fingerprint(pipeline: CoDDPipeline) -> str:
    """A digest of all in a pipeline on which its texts depend."""
    model, tokenizer = pipeline.model, pipeline.tokenizer
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    spelling = [tokenizer.special_tokens_map, tokenizer.chat_template]
    parts = [weights_fingerprint(model), settings_fingerprint(model.config)]
    return json_fingerprint([*parts, scheduler, tokenizer_fingerprint(tokenizer), *spelling])


@dataclass
class AnswerSet:
    """Questions with real answers, a pipeline that answers them, and a judge of the same questions.

    Attributes:
        pipeline: with a tokenizer. Its scheduler's settings hold where others are not given.
        settings: `gen_length`, at which real answers are cut; `batch_size`, which changes the
            speed, not the answers; and `seed`, to which a question's place is added.
        journal: keeps answers for a later run of the same pipeline, judge, questions and settings.
    """

    pipeline: CoDDPipeline
    judge: Judge
    examples: Sequence[Example]
    settings: AnswerSettings
    journal: Path | None = None

    def __post_init__(self) -> None:
        self.block_length = self.pipeline.model.window_length
        questions = [[example.prompt, example.answer] for example in self.examples]
        kept = [questions, self.settings.gen_length, self.settings.seed, self.judge.digest]
        self._made_by = [*kept, pipeline_fingerprint(self.pipeline)]

    def real(self) -> Answers:
        """The real answers, no longer than the pipeline may write them."""
        tokenizer = self.pipeline.tokenizer
        encoded, _ = encode_texts([example.answer for example in self.examples], tokenizer)
        tokens = [row[: self.settings.gen_length] for row in encoded]
        texts = [tokenizer.decode(row) for row in tokens]
        return Answers(texts, tokens, [0] * len(texts), list(self.judge(texts)), 0.0)

    def answers(self, passes: int, **draw: Any) -> Answers:
        """Those under some draw settings: of an earlier run, or else made now and kept.

        Each has so many `passes` of the backbone per block, or fewer where a strategy is adaptive.
        """
        settings = asdict(self.pipeline.scheduler.settings.updated(**draw))
        key = json_fingerprint([*self._made_by, settings, passes])
        kept = read_results(self.journal).get(key) if self.journal else None
        if kept is not None:
            return Answers(**kept)
        answers = self._generate(passes, draw)
        if self.journal:
            append_results(self.journal, [(key, asdict(answers))])
        return answers

    def _generate(self, num_passes: int, draw: dict[str, Any]) -> Answers:
        size, length = self.settings.batch_size, self.settings.gen_length
        ends = self.pipeline.task()["eos_token_id"]
        texts: list[str] = []
        tokens: list[list[int]] = []
        passes: list[int] = []
        started = time.perf_counter()
        for start in range(0, len(self.examples), size):
            batch = [example.prompt for example in self.examples[start : start + size]]
            seeds = range(self.settings.seed + start, self.settings.seed + start + len(batch))
            output = self.pipeline(
                batch,
                gen_length=length,
                block_length=self.block_length,
                num_inference_steps=num_passes * -(-length // self.block_length),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **draw,
            )
            assert output.texts is not None
            assert output.passes_per_row is not None
            texts += output.texts
            for row in output.sequences.tolist():
                tokens.append(list(takewhile(lambda token: token not in ends, row)))
            passes += output.passes_per_row.tolist()
        seconds = time.perf_counter() - started
        return Answers(texts, tokens, passes, list(self.judge(texts)), seconds)
