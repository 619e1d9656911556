"""Answers in GSM8K's format: equations on the way, `#### result` in the last line."""

import re
from fractions import Fraction
from itertools import pairwise

from .task import Task

TIMES, OBELUS = "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}"
DIVIDED = ("/", OBELUS)
NUMBER = r"\$?[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|\$?[0-9]+(?:\.[0-9]+)?"
SIGN = rf"[-+*/{TIMES}{OBELUS}]|(?<![A-Za-z])x(?![A-Za-z])"
CHAIN = re.compile(rf"(?:{NUMBER}|{SIGN}|[ \t=])++")
"""A longest run of what may be in equations; possessive, so that no text takes long."""
SUM = re.compile(rf"\s*-?\s*(?:{NUMBER})(?:\s*(?:{SIGN})\s*(?:{NUMBER}))*\s*")
SIGNED = re.compile(rf"({SIGN})?\s*({NUMBER})")
LONGEST = 200
"""Characters of a side; longer ones are not computed."""
RESULT = re.compile(r"^#### *(-?[0-9][0-9,]*)\s*\Z", re.MULTILINE)


def check_worked_answer(task: Task, text: str) -> bool:
    """Whether each equation is true, and the result right."""
    return all(equations(text)) and result(text) == result(task.answer)


def result(text: str) -> str | None:
    """The number in the last line `#### number`, without commas; None if there is none."""
    found = RESULT.search(text)
    return found and found[1].replace(",", "")


def equations(text: str) -> list[bool]:
    """The equations in a text, in order: whether both sides are numbers and equal.

    A side is a sum of products of numbers without parentheses. Of `a = b = c` there are two
    equations. One that lacks a side, or has another thing there, is wrong.
    """
    found = []
    for chain in CHAIN.findall(text):
        values = map(evaluate, chain.split("="))
        found += [left is not None and left == right for left, right in pairwise(values)]
    return found


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
