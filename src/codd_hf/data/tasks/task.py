"""What a task is, and the words and numbers that several kinds share.

There are few, short and small ones, since a model has to learn each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NAMES = [
    "Ada", "Ann", "Ben", "Bob", "Carl", "Dan", "Emma", "Eva", "Finn", "Gina", "Hugo", "Ida",
    "Jack", "Kim", "Lea", "Leo", "Max", "Mia", "Nora", "Otto", "Paul", "Rosa", "Sam", "Tom",
]  # fmt: skip
THINGS = ["apples", "balls", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "toys"]
FACTOR = range(2, 8)
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


def listed(items: Sequence[object]) -> str:
    """`1, 2 and 3`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
