"""Answers in GSM8K's format: equations on the way, `#### result` in the last line."""

import re
from fractions import Fraction
from itertools import pairwise

from .task import Mark, Task

TIMES, OBELUS = "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}"
DIVIDED = ("/", OBELUS)
NUMBER = r"\$?[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|\$?[0-9]+(?:\.[0-9]+)?"
SIGN = rf"[-+*/{TIMES}{OBELUS}]|(?<![A-Za-z])x(?![A-Za-z])"
CHAIN = re.compile(rf"(?:{NUMBER}|{SIGN}|[ \t=])++")
"""A longest run of what may be in equations; possessive, so that no text takes long."""
SIDE = re.compile("[^=]+|(?<![^=])(?![^=])")
"""What stands between the signs, which may be nothing."""
SUM = re.compile(rf"\s*-?\s*(?:{NUMBER})(?:\s*(?:{SIGN})\s*(?:{NUMBER}))*\s*")
SIGNED = re.compile(rf"({SIGN})?\s*({NUMBER})")
LONGEST = 200
"""Characters of a side; longer ones are not computed."""
RESULT = re.compile(r"^#### *(-?[0-9][0-9,]*)\s*\Z", re.MULTILINE)


def check_worked_answer(task: Task, text: str) -> bool:
    """Whether each equation is true, and the result right."""
    return all(equations(text)) and result(text) == result(task.answer)


def marks_of_worked_answer(task: Task, text: str) -> list[Mark]:
    """A mark of each equation and of the result."""
    marks = marked_equations(text)
    if found := RESULT.search(text):
        marks.append(Mark(found.end(1), result(text) == result(task.answer)))
    return marks


def result(text: str) -> str | None:
    """The number in the last line `#### number`, without commas; None if there is none."""
    found = RESULT.search(text)
    return found and found[1].replace(",", "")


def equations(text: str) -> list[bool]:
    """The equations in a text, in order: whether both sides are numbers and equal.

    A side is a sum of products of numbers without parentheses. Of `a = b = c` there are two
    equations. One that lacks a side, or has another thing there, is wrong.
    """
    return [mark.is_right for mark in marked_equations(text)]


def marked_equations(text: str) -> list[Mark]:
    """As `equations`, with their ends."""
    marks = []
    for chain in CHAIN.finditer(text):
        sides = [(evaluate(side[0]), side) for side in SIDE.finditer(chain[0])]
        for (left, _), (right, side) in pairwise(sides):
            end = chain.start() + side.start() + len(side[0].rstrip())
            marks.append(Mark(end, left is not None and left == right))
    return marks


def evaluate(expression: str) -> Fraction | None:
    """The value of a sum of products, such as `12 - 2*3`; None if it is no such thing."""
    if len(expression) > LONGEST or not SUM.fullmatch(expression):
        return None
    products: list[Fraction] = []
    for sign, number in SIGNED.findall(expression):
        value = Fraction(number.replace(",", "").removeprefix("$"))
        if sign in ("", "+", "-"):
            products.append(-value if sign == "-" else value)
        elif sign not in DIVIDED:
            products[-1] *= value
        elif value == 0:
            return None
        else:
            products[-1] /= value
    return sum(products, Fraction(0))
