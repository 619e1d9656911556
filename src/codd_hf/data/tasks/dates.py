"""A date in words becomes year-month-day, and the other way round."""

import re
from random import Random

from .task import Mark, Task

MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
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
DIGITS = re.compile(r"(?<![0-9])[0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9])")
_DAY, _MONTH, _YEAR = r"(?<![0-9])([0-9]{1,2})", f"({'|'.join(MONTHS)})", r"([0-9]{4})(?![0-9])"
DAY_FIRST = re.compile(rf"{_DAY}(?:(?:st|nd|rd|th) of)? {_MONTH} {_YEAR}")
MONTH_FIRST = re.compile(rf"{_MONTH} {_DAY}, {_YEAR}")


def draw(rng: Random) -> Task:
    """A date to be written in the other form."""
    day, month, year = rng.randrange(1, 29), rng.randrange(1, 13), rng.randrange(2000, 2030)
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


def check(task: Task, text: str) -> bool:
    """Whether the date stands there once, and no other, in the form that is asked for."""
    if DIGITS.search(task.answer):
        return DIGITS.findall(text) == DIGITS.findall(task.answer)
    return _in_words(text) == _in_words(task.answer)


def marks(task: Task, text: str) -> list[Mark]:
    """A mark of each date."""
    forms = (DIGITS,) if DIGITS.search(task.answer) else (DAY_FIRST, MONTH_FIRST)
    dates = [date for form in forms for date in form.finditer(text)]
    return sorted(Mark(date.end(), check(task, date[0])) for date in dates)


def _in_words(text: str) -> list[tuple[str, str, str]]:
    """Day, month and year of the dates of a text in words."""
    turned = [(day, month, year) for month, day, year in MONTH_FIRST.findall(text)]
    return DAY_FIRST.findall(text) + turned


def _ending(day: int) -> str:
    """The end of an ordinal number: `st`, `nd`, `rd` or `th`."""
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
