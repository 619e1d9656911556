"""Quality against backbone passes: coupled and factorized decoding under an independent judge.

Each way of decoding takes, at each number of passes, the setting that serves it best on validation
data out of a grid that is as large for the factorized side as for the coupled one. What is reported
comes from test data. The best setting is the one whose answers the judge finds most likely among
those that keep the token entropy of real answers within a tolerance: a low perplexity that is
bought with few different tokens is no success. By the same rule factorized decoding has the quality
of a coupled setting when the judge finds its answers no less likely and their entropy is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from ..schedulers.settings import ADAPTIVE
from .generated_answers import AnswerSet, Figures, Setting

FACTORIZED = "factorized"
Draw = Mapping[str, Any]


@dataclass(frozen=True)
class QualityPlan:
    """What is measured.

    Attributes:
        samplings: coupled sampling modes of the first table, beside `factorized`.
        passes: backbone passes per window, for all of them.
        strategies: of the second table, with `factorized` and `strategy_sampling`.
        strategy_sampling: a coupled sampling mode.
        strategy_passes: for strategies that commit a fixed number of tokens a step; the adaptive
            ones have a pass for each token.
        thresholds: for the adaptive strategies.
        factorized_grid: settings that factorized decoding may take.
        coupled_grid: settings that each coupled mode may take, as many.
        factorized_chosen_at: passes at which the choice is made; other numbers of passes take the
            choice at the nearest one (by ratio).
        coupled_chosen_at: likewise.
        entropy_tolerance: share of real answers' token entropy that may be missing.

    Raises:
        ValueError: the grids differ in size or are empty, or a list that is needed is empty.
    """

    samplings: Sequence[str]
    passes: Sequence[int]
    strategies: Sequence[str]
    strategy_sampling: str
    strategy_passes: Sequence[int]
    thresholds: Sequence[float]
    factorized_grid: Sequence[Draw]
    coupled_grid: Sequence[Draw]
    factorized_chosen_at: Sequence[int]
    coupled_chosen_at: Sequence[int]
    entropy_tolerance: float = 0.1

    def __post_init__(self) -> None:
        needed = ["samplings", "passes", "factorized_chosen_at", "coupled_chosen_at"]
        needed += ["strategy_passes", "thresholds"] if self.strategies else []
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"`{name}` must not be empty.")
        sizes = len(self.factorized_grid), len(self.coupled_grid)
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError(
                "`factorized_grid` and `coupled_grid` must hold equally many settings, at least "
                f"one, got {sizes[0]} and {sizes[1]}."
            )
        if not 0 <= self.entropy_tolerance <= 1:
            raise ValueError(
                f"`entropy_tolerance` must be from 0 to 1, got {self.entropy_tolerance}."
            )
        if FACTORIZED in (*self.samplings, self.strategy_sampling):
            raise ValueError(
                "`samplings` and `strategy_sampling` must be coupled modes: factorized decoding is "
                "always measured."
            )

    def grid(self, sampling: str) -> Sequence[Draw]:
        return self.factorized_grid if sampling == FACTORIZED else self.coupled_grid

    def chosen_at(self, sampling: str) -> Sequence[int]:
        return self.factorized_chosen_at if sampling == FACTORIZED else self.coupled_chosen_at


@dataclass(frozen=True)
class Row:
    """A setting and the figures of its answers."""

    setting: Setting
    figures: Figures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.setting) | self.figures.as_dict()


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
        differences: nats of factorized minus coupled, and the standard error of this paired
            difference, by factorized passes.
    """

    coupled: Row
    keeps_entropy: bool
    measured: int | None
    passes: float | None
    ratio: float | None
    most: int
    differences: Mapping[int, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        fields = {k: v for k, v in vars(self).items() if k != "coupled"}
        return asdict(self.coupled.setting) | fields


@dataclass(frozen=True)
class QualityResult:
    """All figures: `choices` are of validation data, the others of test data."""

    choices: list[Row]
    real: Figures
    shuffled: Figures
    by_sampling: list[Row]
    by_strategy: list[Row]
    matches: list[Match]

    def as_dict(self) -> dict[str, Any]:
        return {
            "real": self.real.as_dict(),
            "shuffled": self.shuffled.as_dict(),
            **{
                name: [row.as_dict() for row in getattr(self, name)]
                for name in ("by_sampling", "by_strategy", "choices", "matches")
            },
        }


def measure_quality(
    plan: QualityPlan,
    test: AnswerSet,
    validation: AnswerSet | None = None,
    *,
    progress: bool = True,
) -> QualityResult:
    """Chooses on validation data, measures on test data.

    Args:
        plan: what is measured.
        test: the questions that are reported.
        validation: the questions that settings are chosen by; not needed where there is nothing to
            choose.
        progress: show a progress bar.

    Raises:
        ValueError: there is something to choose and no `validation`, it shares a question with
            `test`, or a setting is out of range.
    """
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
    modes = list(dict.fromkeys([FACTORIZED, *plan.samplings, plan.strategy_sampling]))
    strategy = test.pipeline.scheduler.config.strategy
    candidates = [
        Setting(mode, strategy, passes, _complete(mode, draw))
        for mode in modes
        for passes in plan.chosen_at(mode)
        for draw in plan.grid(mode)
    ]
    for setting in candidates + _all_that_may_follow(plan, strategy, test.block_length):
        test.check(setting)
    bar = tqdm(desc="measuring quality", unit="setting", disable=not progress)

    def rows(answers: AnswerSet, settings: Sequence[Setting]) -> list[Row]:
        measured = []
        for setting in settings:
            measured.append(Row(setting, answers.figures(setting)))
            bar.update()
        return measured

    choices = rows(validation, candidates) if choosing else []
    least = _least_entropy(validation.real(), plan) if choosing else 0.0

    def draw(mode: str, passes: int) -> Draw:
        if not choosing:
            return _complete(mode, plan.grid(mode)[0])
        nearest = min(plan.chosen_at(mode), key=lambda at: abs(math.log(at / passes)))
        same = [r for r in choices if (r.setting.sampling, r.setting.passes) == (mode, nearest)]
        return best(same, least).setting.draw

    by_sampling = rows(
        test,
        [
            Setting(mode, strategy, passes, draw(mode, passes))
            for mode in (FACTORIZED, *plan.samplings)
            for passes in plan.passes
        ],
    )
    by_strategy = rows(test, _strategy_settings(plan, test.block_length, draw))
    real, shuffled = test.real(), test.shuffled()
    bar.close()
    matches = find_matches(by_sampling, _least_entropy(real, plan))
    return QualityResult(choices, real, shuffled, by_sampling, by_strategy, matches)


def best(rows: Sequence[Row], least_entropy: float) -> Row:
    """The most likely answers of those that keep the entropy; if none does, the most diverse."""
    kept = [row for row in rows if row.figures.entropy.value >= least_entropy]
    if kept:
        return min(kept, key=lambda row: row.figures.nats.value)
    return max(rows, key=lambda row: row.figures.entropy.value)


def find_matches(rows: Sequence[Row], least_entropy: float) -> list[Match]:
    """Compares each coupled setting with the factorized ones.

    Args:
        rows: factorized and coupled settings that answered the same questions.
        least_entropy: what answers must keep.
    """
    factorized = [row for row in rows if row.setting.sampling == FACTORIZED]
    factorized.sort(key=lambda row: row.setting.passes)
    coupled = [row for row in rows if row.setting.sampling != FACTORIZED]
    return [_match(row, factorized, least_entropy) for row in coupled]


def _match(coupled: Row, factorized: Sequence[Row], least_entropy: float) -> Match:
    target = coupled.figures.nats
    keeps_entropy = coupled.figures.entropy.value >= least_entropy
    measured = passes = None
    before: tuple[int, tuple[float, float]] | None = None
    for row in factorized if keeps_entropy else []:
        number = row.setting.passes
        lacks = (row.figures.nats - target).value, least_entropy - row.figures.entropy.value
        if max(lacks) <= 0:
            measured, passes = number, _crossing(before, number, lacks)
            break
        before = number, lacks
    differences = {row.setting.passes: row.figures.nats - target for row in factorized}
    return Match(
        coupled=coupled,
        keeps_entropy=keeps_entropy,
        measured=measured,
        passes=passes,
        ratio=None if passes is None else passes / coupled.setting.passes,
        most=factorized[-1].setting.passes,
        differences={n: (d.value, d.error) for n, d in differences.items()},
    )


def _crossing(
    before: tuple[int, tuple[float, float]] | None, passes: int, lacks: tuple[float, float]
) -> float:
    """Where the last of what was lacking `before` is there, linear in the logarithm of passes."""
    if before is None:
        return float(passes)
    fewer, lacked = before
    way = max(a / (a - b) if a > 0 else 0.0 for a, b in zip(lacked, lacks, strict=True))
    return fewer * (passes / fewer) ** way


def _complete(sampling: str, draw: Draw) -> Draw:
    """Factorized decoding has one temperature, whatever the scheduler's for the circuit is."""
    return {"evidence_temperature": 1.0, **draw} if sampling == FACTORIZED else dict(draw)


def _least_entropy(real: Figures, plan: QualityPlan) -> float:
    return (1 - plan.entropy_tolerance) * real.entropy.value


def _all_that_may_follow(plan: QualityPlan, strategy: str, block_length: int) -> list[Setting]:
    """A bad setting is to be found before hours have been spent on the good ones."""
    settings = []
    for number in range(len(plan.factorized_grid)):

        def draw(mode: str, _: int, number: int = number) -> Draw:
            return _complete(mode, plan.grid(mode)[number])

        settings += _strategy_settings(plan, block_length, draw)
        settings += [
            Setting(mode, strategy, passes, draw(mode, passes))
            for mode in (FACTORIZED, *plan.samplings)
            for passes in plan.passes
        ]
    return settings


def _strategy_settings(
    plan: QualityPlan, block_length: int, draw: Callable[[str, int], Draw]
) -> list[Setting]:
    settings = []
    for mode in (FACTORIZED, plan.strategy_sampling):
        for strategy in plan.strategies:
            if strategy in ADAPTIVE:
                settings += [
                    Setting(
                        mode,
                        strategy,
                        block_length,
                        {**draw(mode, plan.strategy_passes[0]), "threshold": threshold},
                    )
                    for threshold in plan.thresholds
                ]
            else:
                settings += [
                    Setting(mode, strategy, passes, draw(mode, passes))
                    for passes in plan.strategy_passes
                ]
    return settings
