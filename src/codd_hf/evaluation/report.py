"""The outcome of a measure: a text for people, the same figures for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Report:
    """The outcome of a measure.

    Attributes:
        text: tables in Markdown, and a sentence.
        facts: sizes and settings on which the figures depend.
        figures: values that JSON has.
    """

    text: str
    facts: dict[str, Any]
    figures: dict[str, Any]
