"""Quality against backbone passes: coupled and factorized decoding under an independent judge.

Each way of decoding takes, at each number of passes, the setting that serves it best on validation
data out of a grid that is as large for the factorized side as for the coupled one. Reported figures
come from test data. The best setting is the one whose answers the judge finds most likely among
those that keep the token entropy of real answers within a tolerance: a low perplexity that is
bought with few different tokens is no success. By the same rule factorized decoding has the quality
of a coupled setting when the judge finds its answers no less likely and their entropy is kept.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.sources import Example, load_examples
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import Report
from ..schedulers.strategies import ADAPTIVE
from ..text.encoding import encode_texts
from . import FACTORIZED, QualitySettings
from .judge import Judge, load_judge
from .statistics import entropy, mean, ratio, repeated_ngrams

Row = dict[str, Any]
NATS, ENTROPY = "nats per token", "token entropy"

FACTORIZED_GRID = [
    *({"evidence_temperature": 1.0, "temperature": t} for t in (0.0, 0.5, 0.7, 0.85, 1.0)),
    {"evidence_temperature": 1.0, "temperature": 1.0, "top_p": 0.9},
]
COUPLED_GRID = [
    {"evidence_temperature": 0.7, "temperature": 0.0},
    *({"evidence_temperature": t, "temperature": 1.0} for t in (0.5, 0.7, 0.85, 1.0)),
    {"evidence_temperature": 1.0, "temperature": 1.0, "top_p": 0.9},
]
CHOSEN_AT = (4, 16)
"""Passes at which each mode chooses; others take the choice at the nearest ones."""

ENTROPY_KEPT = 0.9
"""Share of real answers' token entropy that answers must have."""


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
    settings: QualitySettings,
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
        output: Any = pipeline(
            list(questions[batch]),
            gen_length=length,
            block_length=window,
            num_inference_steps=passes * -(-length // window),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
            **draw,
        )
        texts += output.texts
        used += output.passes_per_row.tolist()
        rows = output.sequences.tolist()
        tokens += [list(takewhile(lambda token: token not in ends, row)) for row in rows]
    return Answers(texts, tokens, used, time.perf_counter() - started)


@dataclass(frozen=True)
class Problems:
    """Questions with real answers, a pipeline that answers them too, and a judge."""

    examples: Sequence[Example]
    pipeline: CoDDPipeline
    judge: Judge
    settings: QualitySettings

    def real(self) -> Row:
        """The figures of the real answers, no longer than the pipeline may write them."""
        texts = [example.answer for example in self.examples]
        return self._figures(real_answers(self.pipeline, texts, self.settings.gen_length))

    def row(self, passes: int, sampling: str, strategy: str, draw: dict[str, Any]) -> Row:
        """Draw settings, and the figures of the answers under them."""
        way = {"sampling": sampling, "strategy": strategy}
        told = ", ".join(f"{name} {value}" for name, value in draw.items())
        questions = [example.prompt for example in self.examples]
        answers = generate_answers(self.pipeline, questions, passes, self.settings, **way, **draw)
        return way | {"passes": passes, "settings": told} | self._figures(answers)

    def _figures(self, answers: Answers) -> Row:
        """Nats per token of the judge, entropy of all tokens thrown together, and more."""
        judged = self.judge([example.prompt for example in self.examples], answers.texts)
        nats = ratio(*zip(*judged, strict=True))
        return {
            NATS: nats,
            "perplexity": math.exp(nats.value),
            ENTROPY: entropy(answers.tokens),
            "repeated 3-grams, %": repeated_ngrams(answers.tokens),
            "length": mean([len(tokens) for tokens in answers.tokens]),
            "passes used": mean(answers.passes),
            "seconds": answers.seconds,
        }


def measure(
    pipeline: CoDDPipeline, examples: Sequence[Example], settings: QualitySettings
) -> Report:
    """`codd-hf evaluate quality`."""
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(settings.judge, settings.judge_file, pipeline.model.device)
    test, validation = Problems(examples, pipeline, judge, settings), None
    if settings.choose_on:
        chosen_on = load_examples(settings.choose_on, skip_bad_rows=settings.skip_bad_rows)
        validation = replace(test, examples=chosen_on[: settings.num_validation])
    facts = {
        "judge": Path(settings.judge_file or settings.judge).name,
        "problems": len(examples),
        "validation_problems": len(validation.examples) if validation else 0,
        "gen_length": settings.gen_length,
        "seed": settings.seed,
    }
    return Report(facts, measure_quality(test, validation))


def measure_quality(test: Problems, validation: Problems | None) -> dict[str, list[Row]]:
    """Chooses settings on validation data, or takes the pipeline's own, and measures test data.

    Returns:
        `choices`, figures of validation data; `rows`, of test data, of the real answers first; and
        `matches`, the passes that factorized decoding needs for the quality of each coupled row.

    Raises:
        ValueError: `validation` shares a question with `test`, or a setting is out of range.
    """
    settings, length = test.settings, test.pipeline.model.window_length
    strategies = settings.strategies or [test.pipeline.scheduler.config.strategy]
    modes = [FACTORIZED, *settings.samplings]
    if max(settings.passes) > length:
        raise ValueError(f"`passes` must be at most the window's {length}, got {settings.passes}.")
    real, rows, choices = test.real(), [], []
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    if validation is not None:
        shared = {e.prompt for e in validation.examples} & {e.prompt for e in test.examples}
        if shared:
            raise ValueError(f"`choose_on` and `dataset` share the question {min(shared)!r}.")
        least = ENTROPY_KEPT * validation.real()[ENTROPY].value
        for mode, at in tqdm([*product(modes, CHOSEN_AT)], "choosing settings", disable=None):
            grid = FACTORIZED_GRID if mode == FACTORIZED else COUPLED_GRID
            found = [validation.row(min(at, length), mode, strategies[0], draw) for draw in grid]
            chosen[mode, at] = grid[best(found, least)]
            choices += found
    ways = [(s, n) for s in strategies for n in ([length] if s in ADAPTIVE else settings.passes)]
    for mode, (strategy, passes) in tqdm([*product(modes, ways)], "measuring", disable=None):
        wanted = 1 if strategy in ADAPTIVE else passes
        nearest = CHOSEN_AT[wanted**2 > CHOSEN_AT[0] * CHOSEN_AT[1]]
        # Factorized decoding has one temperature, whatever the scheduler's for the circuit is.
        own = {"evidence_temperature": 1.0} if mode == FACTORIZED else {}
        rows.append(test.row(passes, mode, strategy, chosen.get((mode, nearest), own)))
    matches = find_matches(rows, ENTROPY_KEPT * real[ENTROPY].value)
    rows.insert(0, {"sampling": "real answers"} | real)
    return {"choices": choices, "rows": rows, "matches": matches}


def best(rows: Sequence[Row], least_entropy: float) -> int:
    """The index of the likeliest answers that keep the entropy; if none does, the most diverse."""
    kept = [i for i, row in enumerate(rows) if row[ENTROPY].value >= least_entropy]
    if kept:
        return min(kept, key=lambda i: rows[i][NATS].value)
    return max(range(len(rows)), key=lambda i: rows[i][ENTROPY].value)


def find_matches(rows: Sequence[Row], least_entropy: float) -> list[Row]:
    """Compares each coupled row, but of adaptive strategies, with the factorized ones.

    A match has the fewest measured passes at which the judge finds factorized answers no less
    likely (None: at none, or one side does not keep the entropy) and the paired differences of
    nats.
    """
    matches = []
    for ours in rows:
        if ours["sampling"] == FACTORIZED or ours["strategy"] in ADAPTIVE:
            continue
        same = (FACTORIZED, ours["strategy"])
        theirs = [row for row in rows if (row["sampling"], row["strategy"]) == same]
        keeping = [row for row in theirs if row[ENTROPY].value >= least_entropy]
        enough = [row["passes"] for row in keeping if row[NATS].value <= ours[NATS].value]
        keeps = ours[ENTROPY].value >= least_entropy
        differences = {
            f"factorized - CoDD, nats, {row['passes']} passes": row[NATS] - ours[NATS]
            for row in theirs
        }
        matches.append(
            {name: ours[name] for name in ("sampling", "strategy", "passes")}
            | {"keeps entropy": keeps}
            | {"factorized passes": min(enough, default=None) if keeps else None}
            | differences
        )
    return matches
