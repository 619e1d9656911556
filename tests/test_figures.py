"""Figures in README, guides and cards are those of the JSON files that their page names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("*.md", "*/*.md", "examples/*/*.md")
PAGES = [p.relative_to(ROOT).as_posix() for name in FOLDERS for p in sorted(ROOT.glob(name))]
CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv [0-9.]+", re.DOTALL)
FIGURE = re.compile(r"(?<![\w.])([+-]?[0-9]+(?:\.[0-9]+)?) ± ([0-9]+(?:\.[0-9]+)?)(?![\w.]*[0-9])")


def results(page: str) -> list[Any]:
    """The contents of the files of results that a page names."""
    text = (ROOT / page).read_text()
    names = sorted(set(re.findall(r"results/([\w-]+\.json)", text)))
    return [json.loads((ROOT / "model_cards" / "results" / name).read_text()) for name in names]


def pairs(content: Any) -> Iterator[tuple[float, float]]:
    """All values with their standard errors."""
    if isinstance(content, dict):
        if {"value", "error"} <= content.keys():
            yield content["value"], content["error"]
        for part in content.values():
            yield from pairs(part)
    elif isinstance(content, list):
        for part in content:
            yield from pairs(part)


def is_said_as(value: float, said: str) -> bool:
    digits = len(said.partition(".")[2])
    return abs(value - float(said)) <= 0.5001 * 10**-digits


@pytest.mark.parametrize("page", PAGES)
def test_each_value_with_its_standard_error_is_in_a_file(page):
    text, known = CODE.sub(" ", (ROOT / page).read_text()), list(pairs(results(page)))
    for value, error in FIGURE.findall(" ".join(text.split())):
        assert any(is_said_as(v, value) and is_said_as(e, error) for v, e in known), (value, error)
