"""A date in words becomes year-month-day, and the other way round."""

from __future__ import annotations

import re
from random import Random

from .contents import DAY, MONTHS, YEAR
from .task import Mark, Task

TO_DIGITS = (
    "Write {} as year-month-day.",
    "Give {} in digits only.",
    "What is {} as YYYY-MM-DD?",
)
TO_WORDS = (
    "Write {} with the month in words.",
    "Which day is {}?",
    "Say the date {} in words.",
)
DIGITS = re.compile(r"(?<![0-9])([0-9]{4})-([0-9]{2})-([0-9]{2})(?![0-9])")
MONTH = rf"(?P<month>{'|'.join(MONTHS)})"
NUMBER_OF_DAY, NUMBER_OF_YEAR = r"(?<![0-9])(?P<day>[0-9]{1,2})", r"(?P<year>[0-9]{4})(?![0-9])"
WORDS = (
    re.compile(rf"{NUMBER_OF_DAY}(?:(?:st|nd|rd|th) of)? {MONTH} {NUMBER_OF_YEAR}"),
    re.compile(rf"{MONTH} {NUMBER_OF_DAY}, {NUMBER_OF_YEAR}"),
)


def draw(rng: Random) -> Task:
    """A date to be written in the other form."""
    day, month, year = rng.choice(DAY), rng.randrange(1, 13), rng.choice(YEAR)
    name, digits = MONTHS[month - 1], f"{year}-{month:02}-{day:02}"
    ordinal = f"{day}{_ending(day)}"
    words = (f"{day} {name} {year}", f"{name} {day}, {year}", f"the {ordinal} of {name} {year}")
    if rng.random() < 0.5:
        question = rng.choice(TO_DIGITS).format(rng.choice(words))
        answer = rng.choice((digits, f"It is {digits}.", f"The date is {digits}."))
        return Task("dates", question, answer, digits)
    question = rng.choice(TO_WORDS).format(digits)
    answer = rng.choice((*words, f"It is {words[0]}.", f"It is {words[2]}."))
    return Task("dates", question, answer, digits)


def check(task: Task, text: str) -> list[Mark]:
    """Whether day, month and year are right, in the form that is asked for, and given once."""
    to_digits = DIGITS.search(task.answer) is not None
    (truth,), found = _dates(task.answer, to_digits), _dates(text, to_digits)
    if len(found) != 1:
        return [Mark("date", False)]
    names = ("day", "month", "year")
    return [Mark(name, found[0][name] == truth[name]) for name in names]


def _dates(text: str, in_digits: bool) -> list[dict[str, str]]:
    """The dates of a text in one of the two forms."""
    if in_digits:
        return [dict(zip(("year", "month", "day"), d, strict=True)) for d in DIGITS.findall(text)]
    return [found.groupdict() for form in WORDS for found in form.finditer(text)]


def _ending(day: int) -> str:
    """The end of an ordinal number: `st`, `nd`, `rd` or `th`."""
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
