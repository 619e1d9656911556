"""Answers that a pipeline gives to fixed questions under given settings, judged and kept."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.canvases import Example, tokenize_examples
from ..data.fingerprint import weights_fingerprint
from ..pipelines.pipeline_codd import CoDDPipeline
from ..schedulers.settings import DrawSettings
from ..text.encoding import encode_texts
from .judge import Judge
from .text_statistics import Estimate, entropy, mean, ratio, repeated_ngrams, repeated_words


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


@dataclass(frozen=True)
class Figures:
    """What is reported of answers; the errors are over questions.

    Attributes:
        nats: per token of the judge, all answers thrown together.
        entropy: of the backbone's tokens of all answers thrown together, in nats.
        bigram_entropy: of pairs of neighbouring tokens, likewise.
        repeated_trigrams: share of runs of 3 tokens that the answer had before.
        repeated_words: share of words that equal the word before.
        length: tokens of an answer.
        passes: backbone passes that an answer took.
        seconds: for all answers.
    """

    nats: Estimate
    entropy: Estimate
    bigram_entropy: Estimate
    repeated_trigrams: Estimate
    repeated_words: Estimate
    length: Estimate
    passes: Estimate
    seconds: float

    @classmethod
    def of(cls, answers: Answers) -> Figures:
        return cls(
            nats=ratio(answers.nats, answers.judge_tokens),
            entropy=entropy(answers.tokens),
            bigram_entropy=entropy(answers.tokens, 2),
            repeated_trigrams=repeated_ngrams(answers.tokens, 3),
            repeated_words=repeated_words(answers.texts),
            length=mean([len(tokens) for tokens in answers.tokens]),
            passes=mean(answers.passes),
            seconds=answers.seconds,
        )

    def as_dict(self) -> dict[str, float]:
        """Values, with standard errors under `..._error`, and the perplexity."""
        result = {"perplexity": self.nats.perplexity}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Estimate):
                result[item.name] = value.value
                result[f"{item.name}_error"] = value.error
            else:
                result[item.name] = value
        return result


class AnswerStore:
    """Judged answers in a JSONL file, a setting a line, each on the disk as soon as it is whole.

    A line's key is made of all that shaped it, so that a run takes from the file what it would
    have made itself and nothing else.

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
        if lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()
            os.truncate(path, path.stat().st_size - len(torn))
        try:
            for line in lines:
                record = json.loads(line)
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
        judge: a causal language model.
        judge_tokenizer: the judge's.
        examples: questions and real answers.
        gen_length: tokens to generate; real answers are cut there.
        batch_size: questions answered together; it changes the speed, not the answers.
        seed: question `i` is answered with a generator of seed `seed + i`.
        store: holds what an earlier run has done.

    Raises:
        ValueError: there are fewer than 2 examples, or one has no question or cannot be encoded.
    """

    def __init__(
        self,
        pipeline: CoDDPipeline,
        judge: PreTrainedModel,
        judge_tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        gen_length: int = 128,
        batch_size: int = 20,
        seed: int = 0,
        store: AnswerStore | None = None,
    ) -> None:
        if len(examples) < 2:
            raise ValueError(f"`examples` must be at least 2, for errors, got {len(examples)}.")
        if not all(example.prompt for example in examples):
            raise ValueError("`examples` must each have a question: one has none.")
        self.pipeline, self.examples = pipeline, list(examples)
        self.gen_length, self.batch_size, self.seed = gen_length, batch_size, seed
        self.store = store or AnswerStore(None)
        # Earlier messages are no part of the question, and what is text there is text here.
        asked = tokenize_examples(
            [replace(example, history=()) for example in examples],
            pipeline.tokenizer,
            None,
            mask_token_id=pipeline.model.config.mask_token_id,
        )
        self._prompts = [example.prompt_ids for example in asked]
        self._judge = Judge(judge, judge_tokenizer, [example.prompt for example in examples])
        self._made_by = [
            weights_fingerprint(pipeline.model),
            weights_fingerprint(judge),
            [[example.prompt, example.answer] for example in examples],
            [gen_length, seed],
        ]

    @property
    def block_length(self) -> int:
        return self.pipeline.model.window_length

    def real(self) -> Figures:
        """Of the real answers."""
        return Figures.of(self._judged([e.answer for e in self.examples]))

    def shuffled(self) -> Figures:
        """Of the real answers with their words in random order, which a fit judge likes less."""
        draw = random.Random(self.seed)
        words = [example.answer.split() for example in self.examples]
        return Figures.of(self._judged([" ".join(draw.sample(w, len(w))) for w in words]))

    def figures(self, setting: Setting) -> Figures:
        """Of the answers that the pipeline gives."""
        return Figures.of(self.answers(setting))

    def answers(self, setting: Setting) -> Answers:
        """Those of an earlier run, or else made now and kept.

        Raises:
            ValueError: a setting is out of range.
        """
        made_by = [*self._made_by, asdict(self.check(setting)), setting.passes]
        key = blake2b(json.dumps(made_by).encode(), digest_size=16).hexdigest()
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
            sampling=setting.sampling, strategy=setting.strategy, **setting.draw
        )

    def _generate(self, setting: Setting) -> Answers:
        num_blocks = -(-self.gen_length // self.block_length)
        texts, tokens, passes = [], [], []
        started = time.perf_counter()
        for start in range(0, len(self.examples), self.batch_size):
            batch = self._prompts[start : start + self.batch_size]
            seeds = range(self.seed + start, self.seed + start + len(batch))
            output = self.pipeline(
                input_ids=batch,
                gen_length=self.gen_length,
                block_length=self.block_length,
                num_inference_steps=setting.passes * num_blocks,
                sampling=setting.sampling,
                strategy=setting.strategy,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **setting.draw,
            )
            texts += output.texts
            tokens += [self._until_end(row) for row in output.sequences.tolist()]
            passes += output.passes_per_row.tolist()
        seconds = time.perf_counter() - started
        judged = self._judge(texts)
        nats, judge_tokens = [j.nats for j in judged], [j.num_tokens for j in judged]
        return Answers(texts, tokens, passes, nats, judge_tokens, seconds)

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = self.pipeline.said_of_task()["eos_token_id"]
        return list(takewhile(lambda token: token not in ends, tokens))

    def _judged(self, texts: Sequence[str]) -> Answers:
        """Texts as the pipeline could have written them: no longer than it may write."""
        tokenizer = self.pipeline.tokenizer
        encoded, _ = encode_texts(texts, tokenizer)
        tokens = [row[: self.gen_length] for row in encoded]
        texts = [tokenizer.decode(row) for row in tokens]
        judged = self._judge(texts)
        nats, judge_tokens = [j.nats for j in judged], [j.num_tokens for j in judged]
        return Answers(texts, tokens, [0] * len(texts), nats, judge_tokens, 0.0)
