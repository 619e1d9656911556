"""Quality against backbone passes: coupled and factorized decoding under an independent judge.

Each way of decoding takes, at each number of passes, the setting that serves it best on validation
data out of a grid that is as large for the factorized side as for the coupled one. Reported figures
come from test data. The best setting is the one whose answers the judge finds most likely among
those that keep the token entropy of real answers within a tolerance: a low perplexity that is
bought with few different tokens is no success. By the same rule factorized decoding has the quality
of a coupled setting when the judge finds its answers no less likely and their entropy is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.sources import Example, load_examples
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import Report
from ..text.encoding import encode_texts
from . import FACTORIZED, QualitySettings
from .answer_sets import Answer, AnswerSet, ways
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


def real_answers(pipeline: CoDDPipeline, texts: Sequence[str], length: int) -> list[Answer]:
    """Given texts, cut after `length` tokens of the pipeline's."""
    encoded, _ = encode_texts(texts, pipeline.tokenizer)
    return [Answer(pipeline.tokenizer.decode(row[:length]), row[:length]) for row in encoded]


@dataclass(frozen=True)
class Problems:
    """Questions with real answers, a pipeline that answers them too, and a judge."""

    examples: Sequence[Example]
    pipeline: CoDDPipeline
    judge: Judge
    settings: QualitySettings
    name: str = "test"

    @cached_property
    def generated(self) -> AnswerSet:
        """The pipeline's answers."""
        questions = [example.prompt for example in self.examples]
        return AnswerSet(self.name, self.pipeline, questions, self.settings)

    def real(self) -> Row:
        """The figures of the real answers, no longer than the pipeline may write them."""
        texts = [example.answer for example in self.examples]
        return self._figures(real_answers(self.pipeline, texts, self.generated.gen_length))

    def row(self, passes: int, sampling: str, strategy: str, draw: dict[str, Any]) -> Row:
        """Draw settings, and the figures of the answers under them."""
        way = {"sampling": sampling, "strategy": strategy}
        told = ", ".join(f"{name} {value}" for name, value in draw.items())
        answers = self.generated.answers(passes, **way, **draw)
        return way | {"passes": passes, "settings": told} | self._figures(answers)

    def _figures(self, answers: Sequence[Answer]) -> Row:
        """Nats per token of the judge, entropy of all tokens thrown together, and more."""
        texts, tokens, passes, seconds = zip(*answers, strict=True)
        judged = self.judge([example.prompt for example in self.examples], texts)
        nats = ratio(*zip(*judged, strict=True))
        return {
            NATS: nats,
            "perplexity": math.exp(nats.value),
            ENTROPY: entropy(tokens),
            "repeated 3-grams, %": repeated_ngrams(tokens),
            "length": mean([*map(len, tokens)]),
            "passes used": mean(passes),
            "tokens per pass": ratio([*map(len, tokens)], passes) if any(passes) else None,
            "seconds": sum(seconds),
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
        chosen_on = chosen_on[: settings.num_validation]
        validation = replace(test, examples=chosen_on, name="validation")
    facts = {
        "judge": Path(settings.judge_file or settings.judge).name,
        "problems": len(examples),
        "validation_problems": len(validation.examples) if validation else 0,
        "gen_length": test.generated.gen_length,
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
    length, found_ways = test.pipeline.model.window_length, ways(test.pipeline, test.settings)
    real, rows, choices = test.real(), [], []
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    if validation is not None:
        shared = {e.prompt for e in validation.examples} & {e.prompt for e in test.examples}
        if shared:
            raise ValueError(f"`choose_on` and `dataset` share the question {min(shared)!r}.")
        least = ENTROPY_KEPT * validation.real()[ENTROPY].value
        (_, first, _), modes = found_ways[0], dict.fromkeys(mode for mode, *_ in found_ways)
        for mode, at in tqdm([*product(modes, CHOSEN_AT)], "choosing settings", disable=None):
            grid = FACTORIZED_GRID if mode == FACTORIZED else COUPLED_GRID
            found = [validation.row(min(at, length), mode, first, draw) for draw in grid]
            chosen[mode, at] = grid[best(found, least)]
            choices += found
    for mode, strategy, passes in tqdm(found_ways, "measuring", disable=None):
        nearest = CHOSEN_AT[passes**2 > CHOSEN_AT[0] * CHOSEN_AT[1]]
        draw = chosen.get((mode, nearest), {})
        rows.append(test.row(passes, mode, strategy, draw))
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
    """Compares each coupled row with the factorized ones.

    A match has the fewest measured passes at which the judge finds factorized answers no less
    likely (None: at none, or one side does not keep the entropy) and the paired differences of
    nats.
    """
    matches = []
    for ours in rows:
        if ours["sampling"] == FACTORIZED:
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
