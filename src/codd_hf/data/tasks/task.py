"""What a task is, and the words and numbers that several kinds share.

There are few, short and small ones, since a model has to learn each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NAMES = [
    "Ada", "Ben", "Carl", "Dan", "Emma", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo",
    "Mia", "Nora", "Otto", "Paul",
]  # fmt: skip
THINGS = ["apples", "balls", "books", "cards", "coins", "eggs", "pens", "stamps"]
FACTOR = range(2, 6)
"""Both factors of a product, divisor and quotient."""


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


class Mark(NamedTuple):
    """What a checker says of a part of an answer.

    Attributes:
        end: of the part in the text.
        is_right: whether it is.
    """

    end: int
    is_right: bool


def listed(items: Sequence[object]) -> str:
    """`1, 2 and 3`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
