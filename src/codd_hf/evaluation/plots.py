"""Figures of results, light and dark; a file is the same whenever it is drawn."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""What a measure or a benchmark writes as JSON."""
THEMES = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}
"""Colours of ink and grid; the ground is the page's."""
LINES = ["#8c959f", "#1f83ff", "#e36f1e", "#2da44e", "#a475f9", "#d4a72c", "#e5534b"]
"""Grey for factorized decoding, which comes first."""


def plot_rows(axes: Any, rows: Sequence[Result], by: Sequence[str], x: str, y: str) -> None:
    """A line for the rows that share the columns `by`, with bars of errors."""
    lines: dict[str, list[Any]] = {}
    for row in rows:
        place, height = (v if isinstance(v, dict) else {"value": v} for v in (row[x], row[y]))
        point = (place["value"], height["value"], height.get("error") or 0)
        lines.setdefault(", ".join(str(row[name]) for name in by), []).append(point)
    for colour, (name, points) in zip(cycle(LINES), lines.items(), strict=False):
        axes.errorbar(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))


def plot_accuracy(answers: Result, axes: Any) -> None:
    """Right answers against backbone passes per window."""
    plot_rows(axes, answers["rows"], ["sampling", "strategy"], "passes", "right, %")
    axes.set(xscale="log", xlabel="passes per window")


def plot_parallelism(answers: Result, axes: Any) -> None:
    """Right answers against tokens per pass."""
    plot_rows(axes, answers["rows"], ["sampling", "strategy"], "tokens per pass", "right, %")
    axes.set(xscale="log")


def plot_gap(gap: Result, axes: Any) -> None:
    """Nats per masked token of one parallel step against the mask ratio."""
    rows = [
        {"method": name, "mask ratio": row["mask ratio"], "nats per masked token": nats}
        for row in gap["rows"]
        for name, nats in row.items()
        if isinstance(nats, dict) and not name.startswith("gain")
    ]
    plot_rows(axes, rows, ["method"], "mask ratio", "nats per masked token")


def plot_overhead(overhead: Result, axes: Any) -> None:
    """The head's step, in percent of its backbone's pass, against the vocabulary."""
    rows = overhead["rows"]
    by = [n for n in ("backbone", "tokens of a pass", "evidence") if n in rows[0]]
    plot_rows(axes, rows, by, "vocabulary", "overhead, %")
    axes.set(xscale="log")


FIGURES: dict[str, dict[str, Callable[[Result, Any], None]]] = {
    "answers": {"accuracy": plot_accuracy, "parallelism": plot_parallelism},
    "gap": {"gap": plot_gap},
    "overhead": {"overhead": plot_overhead},
}
"""By the result that they show, and the names of their files."""


def check_matplotlib() -> None:
    """Raises an ImportError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib: `pip install codd-hf[plots]`.")


def draw(figure: str, plot: Callable[[Any], None], folder: Path) -> None:
    """Writes `figure_light.svg` and `figure_dark.svg`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    for theme, (ink, grid) in THEMES.items():
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        style: Any = {"grid.color": grid, "savefig.transparent": True, "svg.hashsalt": figure}
        with rc_context(style | dict.fromkeys(inked, ink)):
            drawing = Figure(figsize=(6.4, 3.8), layout="constrained")
            axes = drawing.subplots()
            plot(axes)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(True)
            axes.legend(frameon=False)
            drawing.savefig(folder / f"{figure}_{theme}.svg", metadata={"Date": None})
