"""Numbers or names are put in order."""

import re
from random import Random
from typing import Any

from .task import NAMES, Mark, Task, listed

QUESTIONS = {
    ("numbers", False): (
        "Sort from small to large: {}.",
        "Put {} in order, the smallest first.",
        "Order {} from low to high.",
    ),
    ("numbers", True): (
        "Sort from large to small: {}.",
        "Put {} in order, the largest first.",
        "Order {} from high to low.",
    ),
    ("names", False): (
        "Sort by the alphabet: {}.",
        "Put {} in order from A to Z.",
        "Order {} by name.",
    ),
    ("names", True): (
        "Sort from Z to A: {}.",
        "Put {} in order from Z to A.",
        "Order {} by name, the last one first.",
    ),
}
ANSWERS = (
    lambda items, sign: ", ".join(items),
    lambda items, sign: f" {sign} ".join(items),
    lambda items, sign: f"{listed(items)}.",
    lambda items, sign: "In order: " + ", ".join(items),
    lambda items, sign: "First " + ", then ".join(items) + ".",
    lambda items, sign: "{} comes first, then {} and {}, and {} is last.".format(*items),
)
ITEM = re.compile(r"[0-9]+|\b(?:" + "|".join(NAMES) + r")\b")
SIGN = re.compile(r"[<>]")


def draw(rng: Random) -> Task:
    """A task with a few distinct numbers or names."""
    what, falling = rng.choice(list(QUESTIONS))
    items: list[Any] = rng.sample(range(1, 31) if what == "numbers" else NAMES, 4)
    ordered = [str(item) for item in sorted(items, reverse=falling)]
    given = rng.choice((listed(items), ", ".join(map(str, items))))
    question = rng.choice(QUESTIONS[what, falling]).format(given)
    answer = rng.choice(ANSWERS)(ordered, ">" if falling else "<")
    return Task("ordering", question, answer, f"{what} {falling} {sorted(items)}")


def check(task: Task, text: str) -> bool:
    """Whether the items stand in order, and signs between them say what is true."""
    items = ITEM.findall(task.answer)
    rising = items == sorted(items, key=int if items[0].isdigit() else str)
    signs = {"<"} if rising else {">"}
    return ITEM.findall(text) == items and signs.issuperset(SIGN.findall(text))


def marks(task: Task, text: str) -> list[Mark]:
    """A mark of each item: whether it stands in its place."""
    items = ITEM.findall(task.answer)
    found = enumerate(ITEM.finditer(text))
    return [Mark(item.end(), items[place : place + 1] == [item[0]]) for place, item in found]
