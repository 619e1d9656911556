"""One page of the results in a folder: a section each, with its plots and tables."""

from functools import partial
from inspect import getdoc
from pathlib import Path

from ..runtime.files import read_json
from ..runtime.report import Report, listed
from . import MEASURES
from .plots import FIGURES, draw, plot_overhead

PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{0}_dark.svg">
  <img alt="{1}" src="{0}_light.svg">
</picture>"""


def write_page(folder: Path, overhead: str | None) -> Path:
    """Writes `report.md` and its plots, of the measures' JSON files beside it.

    Files without settings, which older versions wrote, are left out. `overhead` is the JSON of
    `codd-hf bench overhead`, to be shown as well.
    """
    files = {name: folder / f"{name}.json" for name in MEASURES}
    results = {name: read_json(path) for name, path in files.items() if path.exists()}
    results = {name: result for name, result in results.items() if "settings" in result}
    if overhead is not None:
        bench = read_json(Path(overhead))
        results["overhead"] = bench | bench["benchmarks"]["overhead"]
    parts = ["# Evaluation"]
    for name, result in results.items():
        parts += [f"## {name.capitalize()}", getdoc(MEASURES.get(name, plot_overhead)) or ""]
        for figure, plot in FIGURES.get(name, {}).items():
            draw(figure, partial(plot, result), folder)
            parts.append(PICTURE.format(figure, getdoc(plot)))
        tables = {title: rows for title, rows in result.items() if isinstance(rows, list)}
        parts += [Report(result["facts"], tables).markdown(), listed(result["environment"])]
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page
