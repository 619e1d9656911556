"""Whether an answer is right, by what it says at last."""

import re
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

from ..checks.arguments import choice
from ..data.tasks.equations import equations

NUMBER = r"(?:(?<![\w.)])-)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?"
IN_BRACES = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"
HASHES = "####(.*)"
PATTERNS = {
    "exact": r"(?s)\A.*\Z",
    "last_number": NUMBER,
    "hashes": HASHES,
    "boxed": rf"\\boxed\{{({IN_BRACES})\}}",
    "equations": HASHES,
}
"""What an answer says is the last match, or its first group; `regex:PATTERN` has its own."""


def said(pattern: str, text: str) -> str | Fraction | None:
    """The last match of a pattern in a text, a number as such: $1,000. is 1000, and 1/2 is 0.5."""
    *_, match = [None, *re.finditer(pattern, text)]
    found = " ".join(((match and match[min(match.re.groups, 1)]) or "").split())
    number = found.replace("$", "").rstrip(".")
    if re.fullmatch(NUMBER, number):
        with suppress(ValueError, ZeroDivisionError):  # such as 1.5/2, or a very long one
            return Fraction(number.replace(",", ""))
    return found if match else None


def checker(name: str, truth: str) -> Callable[[str], bool]:
    """A function that says whether an answer is as right as the truth; `AnswersSettings` has names.

    Raises:
        ValueError: there is no such checker, or the truth has nothing that it could compare.
    """
    kind, _, own = name.partition(":")
    choice("checker", kind, [*PATTERNS, "regex"])

    def extract(text: str) -> str | Fraction | None:
        last = kind == "equations" and "####" not in text
        return said(NUMBER if last else PATTERNS.get(kind, own), text)

    try:
        wanted = extract(truth)
    except re.error as error:
        raise ValueError(f"`checker` {name!r} is no regular expression ({error}).") from error
    if wanted is None:
        raise ValueError(f"`checker` {name!r} finds nothing in the answer {truth!r:.100}.")
    return lambda text: extract(text) == wanted and (kind != "equations" or all(equations(text)))
