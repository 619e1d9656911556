"""Names and things that tasks are about. Few and short: a small model has to learn every one."""

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
