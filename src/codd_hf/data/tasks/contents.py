"""Names, things and numbers of tasks: few, short and small, since a model has to learn each."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ada Ann Ben Bob Carl Dan Emma Eva Finn Gina Hugo Ida Jack Kim Lea Leo Max Mia Nora Otto Paul "
    "Rosa Sam Tom"
)
CITIES = _words("Berlin Boston Cairo Delhi Lima London Madrid Oslo Paris Rome Tokyo Vienna")
JOBS = _words("baker cook doctor farmer nurse painter pilot teacher")
THINGS = _words("apples balls books cards coins eggs pens shells stamps toys")
CONTAINERS = _words("bags boxes jars baskets")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)

AGE = range(11, 80)
COUNT = range(2, 31)
PRICE = range(2, 31)
SORTED = range(1, 51)
"""Numbers to be put in order."""
NUM_SORTED = range(3, 5)
"""How many are put in order at once."""
TERM = range(1, 21)
"""Terms of sums."""
NUM_TERMS = range(2, 4)
AMOUNT = range(2, 21)
"""What there is at first in a word problem, and what is added to it."""
FACTOR = range(2, 8)
"""Both factors of a product, divisor and quotient."""
DAY = range(1, 29)
YEAR = range(1950, 2050)
