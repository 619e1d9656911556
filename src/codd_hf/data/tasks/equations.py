"""Answers in GSM8K's format: equations on the way, `#### result` in the last line."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from operator import add, mul, sub, truediv

from .task import Mark, Task

TIMES, OBELUS = "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}"
OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": add,
    "-": sub,
    "*": mul,
    "x": mul,
    TIMES: mul,
    "/": truediv,
    OBELUS: truediv,
}
NUMBER = r"\$?[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|\$?[0-9]+(?:\.[0-9]+)?"
SIGN = rf"[-+*/{TIMES}{OBELUS}]|(?<![A-Za-z])x(?![A-Za-z])"
TOKEN = re.compile(rf"{NUMBER}|{SIGN}")
CHAIN = re.compile(rf"(?:{NUMBER}|{SIGN}|[ \t=])++")
"""A longest run of what may be in equations; possessive, so that no text takes long."""
RESULT = re.compile(r"^#### *(-?[0-9][0-9,]*)\s*\Z", re.MULTILINE)
MAX_DIGITS, MAX_TOKENS = 18, 64
"""Of a number and of a side; longer ones are not computed with."""


def equations(text: str) -> list[Mark]:
    """The equations in a text, in order; right if both sides are numbers and equal.

    A side is a sum of products of numbers without parentheses. Of `a = b = c` there are two
    equations. One that lacks a side, or has another thing there, is wrong.
    """
    marks = []
    for chain in CHAIN.findall(text):
        sides = [side.strip() for side in chain.split("=")]
        for left, right in pairwise(sides):
            value = evaluate(left)
            equal = value is not None and value == evaluate(right)
            marks.append(Mark(f"{left}={right}", equal))
    return marks


def result(text: str) -> str | None:
    """The number in the last line `#### number`, without commas; None if there is none."""
    found = RESULT.search(text)
    return found and found[1].replace(",", "")


def check_worked_answer(task: Task, text: str) -> list[Mark]:
    """Whether each equation is true, and the result right."""
    found = result(text)
    shown = "no result" if found is None else f"#### {found}"
    return [*equations(text), Mark(shown, found is not None and found == result(task.answer))]


def evaluate(expression: str) -> Fraction | None:
    """The value of a sum of products, such as `12 - 2*3`; None if it is no such thing."""
    tokens = TOKEN.findall(expression)
    if len(tokens) > MAX_TOKENS:
        return None
    if tokens[:1] == ["-"]:
        tokens = ["0", *tokens]
    numbers, signs = tokens[::2], tokens[1::2]
    if len(numbers) != len(signs) + 1 or any(sign not in OPERATORS for sign in signs):
        return None
    if any(number in OPERATORS or len(number) > MAX_DIGITS for number in numbers):
        return None
    values = [Fraction(number.replace(",", "").removeprefix("$")) for number in numbers]
    total, sign, product = Fraction(0), add, values[0]
    for name, value in zip(signs, values[1:], strict=True):
        operator = OPERATORS[name]
        if operator in (add, sub):
            total, sign, product = sign(total, product), operator, value
        elif operator is truediv and value == 0:
            return None
        else:
            product = operator(product, value)
    return sign(total, product)
