"""Answers that a pipeline gives to fixed questions under some settings, judged and kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ..data.canvases import tokenize_examples
from ..data.fingerprint import json_fingerprint, weights_fingerprint
from ..data.sources import Example
from ..pipelines.pipeline_codd import CoDDPipeline
from ..schedulers.settings import DrawSettings
from ..text.encoding import encode_texts
from .judge import Judge
from .settings import QualitySettings
from .statistics import Estimate, entropy, mean, ratio, repeated_ngrams


@dataclass(frozen=True)
class Setting:
    """One way of decoding.

    Attributes:
        sampling: the scheduler's.
        strategy: the scheduler's.
        passes: backbone passes per block; for an adaptive strategy, the most of them.
        draw: further settings of the scheduler (`temperature`, `top_p`, ...).
    """

    sampling: str
    strategy: str
    passes: int
    draw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """One answer to each question.

    Attributes:
        texts: without the end-of-text token.
        tokens: the backbone's tokens of each, without end-of-text.
        passes: backbone passes that each took part in; 0 for texts that were not generated.
        nats: of each, under the judge.
        judge_tokens: that the nats are a sum over.
        seconds: that generation took.
    """

    texts: list[str]
    tokens: list[list[int]]
    passes: list[int]
    nats: list[float]
    judge_tokens: list[int]
    seconds: float

    def figures(self) -> dict[str, Estimate]:
        """Nats per token of the judge, entropy of all tokens thrown together, and more."""
        return {
            "nats": ratio(self.nats, self.judge_tokens),
            "entropy": entropy(self.tokens),
            "repeated_trigrams": repeated_ngrams(self.tokens),
            "length": mean([len(tokens) for tokens in self.tokens]),
            "passes": mean(self.passes),
        }


class AnswerStore:
    """Judged answers in a JSONL file, a setting a line, each on the disk as soon as it is whole.

    A line's key is made of all that shaped it, so that a run takes from the file only answers that
    it would have made itself.

    Args:
        path: the file, which need not exist; None keeps nothing.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._kept: dict[str, Answers] = {}
        if path is None or not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # torn by a kill
            os.truncate(path, path.stat().st_size - len(lines.pop()))
        try:
            for record in map(json.loads, lines):
                self._kept[record["key"]] = Answers(**record["answers"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"`samples` {str(path)!r} is no file of judged answers: give another path."
            ) from error

    def get(self, key: str) -> Answers | None:
        return self._kept.get(key)

    def put(self, key: str, setting: Setting, answers: Answers) -> None:
        self._kept[key] = answers
        if self.path is None:
            return
        record = {"key": key, "setting": asdict(setting), "answers": asdict(answers)}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


class AnswerSet:
    """Questions with real answers, a pipeline that answers them, and a judge.

    Args:
        pipeline: with a tokenizer. Its scheduler's settings hold where a `Setting` has none.
        judge: of the same questions.
        examples: questions and real answers.
        settings: `gen_length`, at which real answers are cut; `batch_size`, which changes the
            speed, not the answers; and `seed`, to which a question's place is added.
        store: holds the answers of an earlier run.

    Raises:
        ValueError: there are fewer than 2 examples, or one has no question or cannot be encoded.
    """

    def __init__(
        self,
        pipeline: CoDDPipeline,
        judge: Judge,
        examples: Sequence[Example],
        settings: QualitySettings,
        store: AnswerStore | None = None,
    ) -> None:
        if len(examples) < 2:
            raise ValueError(f"`examples` must be at least 2, for errors, got {len(examples)}.")
        if not all(example.prompt for example in examples):
            raise ValueError("`examples` must each have a question: one has none.")
        self.pipeline, self.judge, self.examples = pipeline, judge, list(examples)
        self.settings = settings
        self.store = store or AnswerStore(None)
        # Earlier messages are no part of the question, and special tokens in it are text.
        asked = tokenize_examples(
            [replace(example, history=()) for example in examples],
            pipeline.tokenizer,
            None,
            mask_token_id=pipeline.model.config.mask_token_id,
        )
        self._prompts = [example.prompt_ids for example in asked]
        self._made_by = [
            weights_fingerprint(pipeline.model),
            weights_fingerprint(judge.model),
            [[example.prompt, example.answer] for example in examples],
            [settings.gen_length, settings.seed],
        ]

    @property
    def block_length(self) -> int:
        return self.pipeline.model.window_length

    def real(self) -> Answers:
        """The real answers, no longer than the pipeline may write them."""
        tokenizer = self.pipeline.tokenizer
        encoded, _ = encode_texts([example.answer for example in self.examples], tokenizer)
        tokens = [row[: self.settings.gen_length] for row in encoded]
        return self._judged(list(map(tokenizer.decode, tokens)), tokens, [0] * len(tokens), 0.0)

    def answers(self, setting: Setting) -> Answers:
        """Those of an earlier run, or else made now and kept.

        Raises:
            ValueError: a setting is out of range.
        """
        made_by = [*self._made_by, asdict(self.check(setting)), setting.passes]
        key = json_fingerprint(made_by)
        answers = self.store.get(key)
        if answers is None:
            answers = self._generate(setting)
            self.store.put(key, setting, answers)
        return answers

    def check(self, setting: Setting) -> DrawSettings:
        """The scheduler's settings in full.

        Raises:
            ValueError: a setting is out of range.
        """
        if not 1 <= setting.passes <= self.block_length:
            raise ValueError(
                f"`passes` must be from 1 to the window's {self.block_length}, got "
                f"{setting.passes}."
            )
        return self.pipeline.scheduler.draw_settings(
            **setting.draw, sampling=setting.sampling, strategy=setting.strategy
        )

    def _generate(self, setting: Setting) -> Answers:
        num_blocks = -(-self.settings.gen_length // self.block_length)
        ends = self.pipeline.task()["eos_token_id"]
        texts, tokens, passes = [], [], []
        started = time.perf_counter()
        for start in range(0, len(self.examples), self.settings.batch_size):
            batch = self._prompts[start : start + self.settings.batch_size]
            seeds = range(self.settings.seed + start, self.settings.seed + start + len(batch))
            output = self.pipeline(
                input_ids=batch,
                gen_length=self.settings.gen_length,
                block_length=self.block_length,
                num_inference_steps=setting.passes * num_blocks,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **setting.draw,
                sampling=setting.sampling,
                strategy=setting.strategy,
            )
            texts += output.texts
            rows = output.sequences.tolist()
            tokens += [list(takewhile(lambda token: token not in ends, row)) for row in rows]
            passes += output.passes_per_row.tolist()
        return self._judged(texts, tokens, passes, time.perf_counter() - started)

    def _judged(
        self, texts: list[str], tokens: list[list[int]], passes: list[int], seconds: float
    ) -> Answers:
        nats, judge_tokens = map(list, zip(*self.judge(texts), strict=True))
        return Answers(texts, tokens, passes, nats, judge_tokens, seconds)
