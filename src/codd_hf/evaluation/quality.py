"""Quality against backbone passes: coupled and factorized decoding under an independent judge.

Each way of decoding takes, at each number of passes, the setting that serves it best on validation
data out of a grid that is as large for the factorized side as for the coupled one. Reported figures
come from test data. The best setting is the one whose answers the judge finds most likely among
those that keep the token entropy of real answers within a tolerance: a low perplexity that is
bought with few different tokens is no success. By the same rule factorized decoding has the quality
of a coupled setting when the judge finds its answers no less likely and their entropy is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.sources import Example, load_examples
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import table
from ..schedulers.strategies import ADAPTIVE
from .answers import Answers, AnswerSet, AnswerStore, Setting
from .judge import Judge, load_judge
from .report import Report
from .settings import FACTORIZED, QualitySettings
from .statistics import Estimate

Draw = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A setting and its answers; the setting of real answers is None."""

    setting: Setting | None
    answers: Answers

    @cached_property
    def figures(self) -> dict[str, Estimate]:
        return self.answers.figures()

    def as_dict(self) -> dict[str, Any]:
        row = {} if self.setting is None else asdict(self.setting)
        row["perplexity"] = math.exp(self.figures["nats"].value)
        for name, figure in self.figures.items():
            row |= {name: figure.value, f"{name}_error": figure.error}
        return row | {"seconds": self.answers.seconds}

    def cells(self) -> dict[str, Any]:
        """The row of a table."""
        setting, figures = self.setting, self.figures
        row = {"sampling": "real answers", "strategy": None, "passes": None, "settings": None}
        if setting is not None:
            row |= vars(setting) | {
                "settings": ", ".join(f"{name} {value}" for name, value in setting.draw.items())
            }
            del row["draw"]
        return row | {
            "nats per token": f"{figures['nats']:.3f}",
            "perplexity": math.exp(figures["nats"].value),
            "token entropy": f"{figures['entropy']:.3f}",
            "repeated 3-grams": f"{figures['repeated_trigrams'] * 100:.1f} %",
            "length": figures["length"].value,
            "passes used": figures["passes"].value,
            "seconds": self.answers.seconds,
        }


@dataclass(frozen=True)
class Match:
    """How many passes factorized decoding needs for the quality of a coupled setting.

    Attributes:
        coupled: the setting and its figures.
        keeps_entropy: whether the coupled answers keep real text's; if not, nothing is compared.
        measured: the fewest passes, of those measured, that reach the quality; None: none does.
        passes: the passes at which the quality is crossed, with the figures interpolated over the
            logarithm of the passes.
        ratio: `passes` over the coupled passes.
        most: the most passes that factorized decoding was given.
        differences: nats of factorized minus coupled, paired, by factorized passes.
    """

    coupled: Row
    keeps_entropy: bool
    measured: int | None
    passes: float | None
    ratio: float | None
    most: int
    differences: Mapping[int, Estimate]

    def as_dict(self) -> dict[str, Any]:
        differences = {n: (d.value, d.error) for n, d in self.differences.items()}
        fields = {k: v for k, v in vars(self).items() if k != "coupled"}
        return asdict(self.coupled.setting) | fields | {"differences": differences}

    def cells(self) -> dict[str, str]:
        """The row of a table."""
        setting = self.coupled.setting
        needed, ratio = "entropy too low", None
        if self.keeps_entropy:
            needed, ratio = f"> {self.most}", f"> {self.most / setting.passes:g}"
        if self.passes is not None:
            needed, ratio = f"{self.passes:.1f} ({self.measured})", f"{self.ratio:.1f}"
        row = {"sampling": setting.sampling, "CoDD passes": setting.passes}
        row |= {"factorized passes": needed, "ratio": ratio}
        return row | {
            f"factorized - CoDD, nats, {n} passes": f"{figure:+.3f}"
            for n, figure in self.differences.items()
        }


@dataclass(frozen=True)
class QualityResult:
    """All figures: `choices` are of validation data, the others of test data."""

    choices: list[Row]
    real: Row
    rows: list[Row]
    matches: list[Match]

    def as_dict(self) -> dict[str, Any]:
        lists = ("choices", "rows", "matches")
        return {"real": self.real.as_dict()} | {
            name: [row.as_dict() for row in getattr(self, name)] for name in lists
        }

    def tables(self) -> str:
        """Choices, results and comparison; figures stand with their standard errors."""
        titles = {
            "Settings to choose among, on validation data:": self.choices,
            "At the chosen settings, on test data:": [self.real, *self.rows],
            "Passes that factorized decoding needs for the same quality:": self.matches,
        }
        return "\n".join(
            f"{title}\n\n{table([row.cells() for row in rows])}\n"
            for title, rows in titles.items()
            if rows
        )


def measure_quality(
    plan: QualitySettings, test: AnswerSet, validation: AnswerSet | None, progress: bool = True
) -> QualityResult:
    """Chooses settings on validation data and measures them on test data.

    Args:
        plan: what is measured.
        test: for the figures that are reported.
        validation: for the choice; needed unless the grids have one setting each.
        progress: show a progress bar.

    Raises:
        ValueError: there is a choice and `validation` is missing or shares a question with `test`,
            or a setting is out of range.
    """
    grids = {mode: [_draw(text) for text in plan.coupled_grid] for mode in plan.samplings}
    # Factorized decoding has one temperature, whatever the scheduler's for the circuit is.
    factorized = [{"evidence_temperature": 1.0, **_draw(text)} for text in plan.factorized_grid]
    grids = {FACTORIZED: factorized, **grids}
    choosing = len(plan.factorized_grid) > 1
    if choosing and validation is None:
        raise ValueError(
            f"`validation` is needed to choose among {len(plan.factorized_grid)} settings: give "
            "data that are not reported, or one setting for each side."
        )
    if choosing:
        shared = {e.prompt for e in validation.examples} & {e.prompt for e in test.examples}
        if shared:
            raise ValueError(
                f"`validation` shares {len(shared)} questions with `test`, such as "
                f"{min(shared)[:60]!r}: settings must be chosen on data that are not reported."
            )
    strategies = plan.strategies or [test.pipeline.scheduler.config.strategy]

    def settings(mode: str, draw: Callable[[int], Draw]) -> list[Setting]:
        found = []
        for strategy in strategies:
            if strategy in ADAPTIVE:  # has a pass for each token
                found += [
                    Setting(mode, strategy, test.block_length, {**draw(1), "threshold": threshold})
                    for threshold in plan.thresholds
                ]
            else:
                found += [Setting(mode, strategy, n, draw(n)) for n in plan.passes]
        return found

    candidates = [
        Setting(mode, strategies[0], number, draw)
        for mode, grid in grids.items()
        for number in plan.chosen_at
        for draw in grid
    ]
    # A bad setting is to be found before hours have been spent on the good ones.
    for setting in candidates:
        test.check(setting)
        for later in settings(setting.sampling, lambda _, draw=setting.draw: draw):
            test.check(later)
    with tqdm(desc="measuring quality", unit="setting", disable=not progress) as bar:

        def row(answers: AnswerSet, setting: Setting) -> Row:
            bar.update()
            return Row(setting, answers.answers(setting))

        choices = [row(validation, setting) for setting in candidates] if choosing else []
        keeps, least = 1 - plan.entropy_tolerance, 0.0
        if choosing:
            least = keeps * Row(None, validation.real()).figures["entropy"].value
        rows = []
        for mode, grid in grids.items():

            def chosen(passes: int, mode: str = mode, grid: list[Draw] = grid) -> Draw:
                if not choosing:
                    return grid[0]
                at = min(plan.chosen_at, key=lambda at: abs(math.log(at / passes)))
                ours = [r for r in choices if r.setting.sampling == mode]
                return best([r for r in ours if r.setting.passes == at], least).setting.draw

            rows += [row(test, setting) for setting in settings(mode, chosen)]
    real = Row(None, test.real())
    matches = find_matches(rows, keeps * real.figures["entropy"].value)
    return QualityResult(choices, real, rows, matches)


def _draw(text: str) -> Draw:
    """`{"temperature": 0.5, "top_p": 0.9}` of `temperature=0.5,top_p=0.9`."""
    try:
        draw = dict(part.split("=") for part in text.split(","))
        return {name: json.loads(value) for name, value in draw.items()}
    except ValueError as error:
        raise ValueError(
            f"A grid must hold settings like temperature=0.5,top_p=0.9, got {text!r}."
        ) from error


def best(rows: Sequence[Row], least_entropy: float) -> Row:
    """The most likely answers of those that keep the entropy; if none does, the most diverse."""
    kept = [row for row in rows if row.figures["entropy"].value >= least_entropy]
    if kept:
        return min(kept, key=lambda row: row.figures["nats"].value)
    return max(rows, key=lambda row: row.figures["entropy"].value)


def find_matches(rows: Sequence[Row], least_entropy: float) -> list[Match]:
    """Compares each coupled setting with the factorized ones of its strategy.

    Args:
        rows: settings that answered the same questions; those of adaptive strategies, which have no
            number of passes, are passed over.
        least_entropy: that answers must keep.
    """
    matches = []
    for row in rows:
        ours = row.setting
        factorized = [
            other
            for other in rows
            if (other.setting.sampling, other.setting.strategy) == (FACTORIZED, ours.strategy)
        ]
        if ours.sampling != FACTORIZED and ours.strategy not in ADAPTIVE:
            factorized.sort(key=lambda other: other.setting.passes)
            matches.append(_match(row, factorized, least_entropy))
    return matches


def _match(coupled: Row, factorized: Sequence[Row], least_entropy: float) -> Match:
    differences = {
        row.setting.passes: row.figures["nats"] - coupled.figures["nats"] for row in factorized
    }
    # At each number of passes, the nats and the entropy that factorized decoding lacks.
    lacks = [
        (differences[row.setting.passes].value, least_entropy - row.figures["entropy"].value)
        for row in factorized
    ]
    keeps = coupled.figures["entropy"].value >= least_entropy
    measured = passes = None
    at = next((i for i, lack in enumerate(lacks) if keeps and max(lack) <= 0), None)
    if at is not None:
        measured = passes = factorized[at].setting.passes
    if at:
        # Where the last of the lacks before is made up, linear in the logarithm of passes.
        fewer = factorized[at - 1].setting.passes
        pairs = zip(lacks[at - 1], lacks[at], strict=True)
        way = max(a / (a - b) if a > 0 else 0.0 for a, b in pairs)
        passes = fewer * (measured / fewer) ** way
    return Match(
        coupled=coupled,
        keeps_entropy=keeps,
        measured=measured,
        passes=passes,
        ratio=None if passes is None else passes / coupled.setting.passes,
        most=factorized[-1].setting.passes,
        differences=differences,
    )


def evaluate(
    pipeline: CoDDPipeline, examples: Sequence[Example], settings: QualitySettings
) -> Report:
    """`codd-hf evaluate quality`."""
    pipeline.set_progress_bar_config(disable=True)
    model = load_judge(settings.judge, settings.judge_file, pipeline.model.device)
    samples = settings.samples or (f"{settings.output}.samples.jsonl" if settings.output else None)
    store = AnswerStore(Path(samples) if samples else None)

    def answer_set(examples: Sequence[Example]) -> AnswerSet:
        judge = Judge(*model, [example.prompt for example in examples])
        return AnswerSet(pipeline, judge, examples, settings, store)

    validation = None
    if settings.choose_on:
        chosen_on = load_examples(settings.choose_on, skip_bad_rows=settings.skip_bad_rows)
        validation = answer_set(chosen_on[: settings.num_validation])
    result = measure_quality(settings, answer_set(examples), validation)
    facts = {
        "judge": Path(settings.judge_file or settings.judge).name,
        "problems": len(examples),
        "validation_problems": len(validation.examples) if validation else 0,
        "gen_length": settings.gen_length,
        "entropy_tolerance": settings.entropy_tolerance,
        "seed": settings.seed,
    }
    return Report(result.tables(), facts, result.as_dict())
