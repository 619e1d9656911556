"""Answers that a pipeline gives to questions, at so many passes and under some settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from ..pipelines.pipeline_codd import CoDDPipeline
from ..text.encoding import encode_texts
from .settings import AnswerSettings


@dataclass(frozen=True)
class Answers:
    """One answer to each question, without end-of-text.

    Attributes:
        passes: backbone passes that each took part in; 0 for texts that were not generated.
        seconds: that generation took.
    """

    texts: list[str]
    tokens: list[list[int]]
    passes: list[int]
    seconds: float


def real_answers(pipeline: CoDDPipeline, texts: Sequence[str], length: int) -> Answers:
    """Given texts, cut after `length` tokens of the pipeline's."""
    encoded, _ = encode_texts(texts, pipeline.tokenizer)
    tokens = [row[:length] for row in encoded]
    texts = [pipeline.tokenizer.decode(row) for row in tokens]
    return Answers(texts, tokens, [0] * len(texts), 0.0)


def generate_answers(
    pipeline: CoDDPipeline,
    questions: Sequence[str],
    passes: int,
    settings: AnswerSettings,
    **draw: Any,
) -> Answers:
    """Each in `passes` passes per window, or fewer where a strategy is adaptive or a text ends.

    Args:
        pipeline: with a tokenizer. Its scheduler's settings hold where others are not given.
        questions: the prompts.
        passes: of the backbone, for each window of the head.
        settings: `gen_length`; `batch_size`, which changes the speed, not the answers; and `seed`,
            to which a question's place is added.
        **draw: draw settings.
    """
    size, length = settings.batch_size, settings.gen_length
    window = pipeline.model.window_length
    ends = pipeline.task()["eos_token_id"]
    seeds = range(settings.seed, settings.seed + len(questions))
    texts: list[str] = []
    tokens: list[list[int]] = []
    used: list[int] = []
    started = time.perf_counter()
    for start in range(0, len(questions), size):
        batch = slice(start, start + size)
        output = pipeline(
            list(questions[batch]),
            gen_length=length,
            block_length=window,
            num_inference_steps=passes * -(-length // window),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
            **draw,
        )
        assert output.texts is not None
        assert output.passes_per_row is not None
        texts += output.texts
        used += output.passes_per_row.tolist()
        for row in output.sequences.tolist():
            tokens.append(list(takewhile(lambda token: token not in ends, row)))
    return Answers(texts, tokens, used, time.perf_counter() - started)
