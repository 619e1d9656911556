"""Word problems of one to three steps in GSM8K's answer format."""

from random import Random
from typing import Any, NamedTuple

from .equations import check_worked_answer, evaluate, marks_of_worked_answer
from .task import FACTOR, NAMES, THINGS, Task

CONTAINERS = ["bags", "boxes", "jars", "baskets"]
AMOUNT = range(2, 10)
"""What there is at first, and what is added to it or lost."""


class Problem(NamedTuple):
    """A kind of word problem.

    Attributes:
        numbers: the names of its numbers, as in `AMOUNT`s `a b` and `FACTOR`s `f g h`.
        steps: from the numbers and the earlier results, which are called `1`, `2` and so on.
        unit: of every result.
        wordings: of the question.
    """

    numbers: str
    steps: tuple[str, ...]
    unit: str
    wordings: tuple[str, ...]


PROBLEMS = {
    "gain": Problem("a b", ("a + b",), "{things}", (
        "{A} has {a} {things} and gets {b} more. How many {things} has {A} now?",
        "{A} finds {b} {things}. Before, {A} had {a}. How many are there now?",
        "There are {a} {things} and {A} adds {b}. How many are there in all?",
    )),
    "loss": Problem("a b", ("a - b",), "{things}", (
        "{A} has {a} {things} and gives {b} to {B}. How many {things} are left?",
        "{A} loses {b} of {a} {things}. How many {things} has {A} now?",
        "Of {a} {things} {A} sells {b}. How many are left?",
    )),
    "groups": Problem("f g", ("f * g",), "{things}", (
        "{A} has {f} {boxes} with {g} {things} in each. How many {things} are there?",
        "There are {g} {things} in each of {f} {boxes}. How many {things} are there?",
        "{A} fills {f} {boxes} with {g} {things} each. How many {things} are there in all?",
    )),
    "share": Problem("fg f", ("fg / f",), "{things}", (
        "{A} puts {fg} {things} into {f} {boxes}, the same in each. How many are in each?",
        "{fg} {things} are shared by {f} children. How many {things} does each get?",
        "{A} gives {fg} {things} to {f} friends, each the same. How many {things} has each?",
    )),
    "groups and more": Problem("f g a", ("f * g", "1 + a"), "{things}", (
        "{A} has {f} {boxes} of {g} {things} and {a} more {things}. How many are there in all?",
        "{A} has {a} {things} and {f} {boxes} with {g} {things} in each. How many are there?",
        "In each of {f} {boxes} are {g} {things}, and {A} has {a} beside. How many in all?",
    )),
    "gain and loss": Problem("a b c", ("a + b", "1 - c"), "{things}", (
        "{A} has {a} {things}, gets {b} and gives {c} away. How many are left?",
        "{A} had {a} {things}, found {b} more and lost {c}. How many has {A} now?",
        "There were {a} {things}. {A} adds {b}, then {B} takes {c}. How many are there now?",
    )),
    "comparison": Problem("a b", ("a + b", "a + 1"), "{things}", (
        "{A} has {a} {things}. {B} has {b} more than {A}. How many have both together?",
        "{B} has {b} {things} more than {A}, who has {a}. How many have they together?",
        "{A} found {a} {things} and {B} {b} more than that. How many did both find?",
    )),
    "times as many": Problem("f g", ("f * g", "g + 1"), "{things}", (
        "{A} has {g} {things}. {B} has {f} times as many. How many have both together?",
        "{B} has {f} times as many {things} as {A}, who has {g}. How many have they together?",
        "{A} found {g} {things} and {B} {f} times as many. How many did both find?",
    )),
    "remainder shared": Problem("fg+a a f", ("fg+a - a", "1 / f"), "{things}", (
        "{A} has {fg+a} {things}, keeps {a} and shares the rest among {f} friends. "
        "How many does each get?",
        "Of {fg+a} {things} {a} are lost. {f} children share the others. How many has each?",
        "{A} sells {a} of {fg+a} {things} and puts the rest into {f} {boxes}. "
        "How many are in each?",
    )),
    "change": Problem("fg+a f g", ("f * g", "fg+a - 1"), "dollars", (
        "{A} has {fg+a} dollars and buys {f} {things} for {g} dollars each. "
        "How many dollars are left?",
        "{A} buys {f} {things} at {g} dollars each and pays with {fg+a} dollars. "
        "How many dollars does {A} get back?",
        "From {fg+a} dollars {A} pays for {f} {things}, {g} dollars each. What is left?",
    )),
    "wages": Problem("f g a b", ("f * g", "a + 1", "2 + b"), "dollars", (
        "{A} has {a} dollars, works {f} hours for {g} dollars an hour and finds {b} dollars. "
        "How many dollars has {A} now?",
        "{A} had {a} dollars. {A} earned {g} dollars an hour for {f} hours, and {B} gave {b} more. "
        "How many dollars has {A}?",
    )),
    "two prices": Problem("f g h i", ("f * g", "h * i", "1 + 2"), "dollars", (
        "{A} buys {f} {things} for {g} dollars each and {h} {boxes} for {i} dollars each. "
        "How many dollars is that?",
        "What do {f} {things} at {g} dollars and {h} {boxes} at {i} dollars cost together?",
    )),
}  # fmt: skip
ANSWERS = (
    lambda steps, unit: "\n".join(steps),
    lambda steps, unit: "\n".join(f"{step} {unit}" for step in steps),
    lambda steps, unit: "First " + ", then ".join(steps) + f" {unit}.",
    lambda steps, unit: "We have " + ", so ".join(steps) + f" {unit}.",
)


check, marks = check_worked_answer, marks_of_worked_answer


def draw(rng: Random) -> Task:
    """A task of one of the kinds in `PROBLEMS`."""
    name = rng.choice(list(PROBLEMS))
    problem = PROBLEMS[name]
    numbers = _numbers(rng)
    while not _leaves_something(name, **numbers):
        numbers = _numbers(rng)
    values: dict[str, Any] = dict(numbers)
    steps: list[str] = []
    for step in problem.steps:
        left, sign, right = step.split()
        equation = f"{values[left]}{sign}{values[right]}"
        value = evaluate(equation)
        steps.append(f"{equation}={value}")
        values[str(len(steps))] = value
    people = rng.sample(NAMES, 2)
    things, boxes = rng.choice(THINGS), rng.choice(CONTAINERS)
    words = {"A": people[0], "B": people[1], "things": things, "boxes": boxes}
    question = rng.choice(problem.wordings).format(**words, **numbers)
    unit = problem.unit.format(things=things)
    answer = f"{rng.choice(ANSWERS)(steps, unit)}\n#### {values[str(len(steps))]}"
    asked = " ".join(str(numbers[n]) for n in problem.numbers.split())
    return Task("word problems", question, answer, f"{name} {things} {asked}")


def _numbers(rng: Random) -> dict[str, int]:
    """Amounts `a b c`, factors `f g h i`, and products and sums that divide evenly."""
    numbers = {name: rng.choice(AMOUNT) for name in "abc"}
    numbers |= {name: rng.choice(FACTOR) for name in "fghi"}
    product = numbers["f"] * numbers["g"]
    return numbers | {"fg": product, "fg+a": product + numbers["a"]}


def _leaves_something(name: str, a: int, b: int, c: int, **_: int) -> bool:
    """Whether no more is lost than there is."""
    return {"loss": b < a, "gain and loss": c < a + b}.get(name, True)
