"""What a task is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A question with one right answer of the many that its kind accepts.

    Attributes:
        kind: of the task, a name in `KINDS`.
        question: in one of the kind's wordings.
        answer: a right one, in one of the kind's wordings.
        content: what is asked, whatever the wording; it decides the split.
    """

    kind: str
    question: str
    answer: str
    content: str


def listed(items: Sequence[object]) -> str:
    """`1, 2 and 3`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
