"""The measured quality as tables in Markdown, and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from .generated_answers import Figures
from .quality import Match, QualityResult, Row
from .text_statistics import Estimate

COLUMNS = (
    "nats per token",
    "perplexity",
    "token entropy",
    "bigram entropy",
    "repeated 3-grams",
    "repeated words",
    "length",
    "passes used",
    "seconds",
)


def quality_tables(result: QualityResult) -> str:
    """Choices, both tables and the comparison; figures are given with their standard errors."""
    texts = [("real answers", result.real), ("real answers, words shuffled", result.shuffled)]
    parts = []
    if result.choices:
        parts.append("Settings to choose among, on validation data:\n")
        parts.append(_table([], result.choices))
    parts.append("Sampling modes, at the chosen settings, on test data:\n")
    parts.append(_table(texts, result.by_sampling))
    if result.by_strategy:
        parts.append("Strategies:\n")
        parts.append(_table([], result.by_strategy))
    parts.append("Passes that factorized decoding needs for the same quality:\n")
    parts.append(_match_table(result.matches))
    return "\n".join(parts)


def conclusion(result: QualityResult, sampling: str, passes: int) -> str:
    """What one coupled setting is worth in factorized passes.

    Args:
        result: of a measurement.
        sampling: a coupled mode of its first table.
        passes: per window, of the first table.

    Raises:
        ValueError: the first table has no such row.
    """
    for match in result.matches:
        setting = match.coupled.setting
        if (setting.sampling, setting.passes) == (sampling, passes):
            break
    else:
        raise ValueError(f"`passes` {passes} of {sampling!r} were not measured.")
    figures, real = match.coupled.figures, result.real
    start = (
        f"CoDD ({sampling}) with {passes} passes per window: {_pm(figures.nats)} nats per token, "
        f"token entropy {_pm(figures.entropy)} (real answers {_pm(real.nats)} and "
        f"{_pm(real.entropy)})."
    )
    if not match.keeps_entropy:
        return f"{start} Its entropy is too low for a comparison."
    if match.passes is None:
        return (
            f"{start} Factorized decoding does not reach it with {match.most} passes: ratio above "
            f"{match.most / passes:g}."
        )
    return (
        f"{start} Factorized decoding needs {match.passes:.1f} ({match.measured} of those "
        f"measured): ratio {match.ratio:.1f}."
    )


def _table(texts: Sequence[tuple[str, Figures]], rows: Sequence[Row]) -> str:
    header = ["sampling", "strategy", "passes", "settings", *COLUMNS]
    lines = [_line(header), "|" + " --- |" * len(header)]
    lines += [_line([name, "-", "-", "-", *_cells(figures)]) for name, figures in texts]
    for row in rows:
        setting = row.setting
        draw = ", ".join(f"{name} {value}" for name, value in setting.draw.items())
        cells = [setting.sampling, setting.strategy, str(setting.passes), draw]
        lines.append(_line([*cells, *_cells(row.figures)]))
    return "\n".join(lines) + "\n"


def _cells(figures: Figures) -> list[str]:
    generated = figures.passes.value > 0
    return [
        _pm(figures.nats),
        f"{figures.nats.perplexity:.1f}",
        _pm(figures.entropy),
        _pm(figures.bigram_entropy),
        _percent(figures.repeated_trigrams),
        _percent(figures.repeated_words),
        f"{figures.length.value:.0f}",
        f"{figures.passes.value:.1f}" if generated else "-",
        f"{figures.seconds:.0f}" if generated else "-",
    ]


def _match_table(matches: Sequence[Match]) -> str:
    numbers = list(matches[0].differences)
    header = ["sampling", "CoDD passes", "factorized passes", "ratio"]
    header += [f"factorized - CoDD, nats, {n} passes" for n in numbers]
    lines = [_line(header), "|" + " --- |" * len(header)]
    for match in matches:
        setting = match.coupled.setting
        if not match.keeps_entropy:
            needed, ratio = "entropy too low", "-"
        elif match.passes is None:
            needed, ratio = f"> {match.most}", f"> {match.most / setting.passes:g}"
        else:
            needed, ratio = f"{match.passes:.1f} ({match.measured})", f"{match.ratio:.1f}"
        cells = [setting.sampling, str(setting.passes), needed, ratio]
        cells += [
            f"{match.differences[n][0]:+.3f} ± {match.differences[n][1]:.3f}" for n in numbers
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _pm(figure: Estimate) -> str:
    return f"{figure.value:.3f} ± {figure.error:.3f}"


def _percent(figure: Estimate) -> str:
    return f"{100 * figure.value:.1f} ± {100 * figure.error:.1f} %"
