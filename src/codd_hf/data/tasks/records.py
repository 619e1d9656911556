"""A sentence becomes a JSON object; its fields may come in any order."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .contents import AGE, CITIES, COUNT, DAYS, JOBS, NAMES, PRICE, THINGS
from .task import Mark, Task

REQUESTS = ("Write as JSON: {}", "{} Give this as JSON.", "Turn into JSON: {}", "JSON of this: {}")
SENTENCES = {
    "person": (
        "{name} is a {job} of {age} and lives in {city}.",
        "In {city} lives {name}, a {job}, {age} years old.",
        "{name}, {age}, works as a {job} in {city}.",
        "The {job} {name} from {city} is {age} years old.",
    ),
    "order": (
        "{name} orders {count} {item} for {price} dollars.",
        "For {price} dollars {name} buys {count} {item}.",
        "{count} {item} for {name}, {price} dollars in all.",
    ),
    "trip": (
        "{name} goes from {from} to {to} on {day}.",
        "On {day} {name} travels to {to} from {from}.",
        "{name} leaves {from} on {day} and goes to {to}.",
    ),
}


def draw(rng: Random) -> Task:
    """A task about a person, an order or a trip."""
    topic = rng.choice(list(SENTENCES))
    record: dict[str, str | int] = {"name": rng.choice(NAMES)}
    if topic == "person":
        record |= {"age": rng.choice(AGE), "job": rng.choice(JOBS), "city": rng.choice(CITIES)}
    elif topic == "order":
        item = rng.choice(THINGS)
        record |= {"count": rng.choice(COUNT), "item": item, "price": rng.choice(PRICE)}
    else:
        start, end = rng.sample(CITIES, 2)
        record |= {"from": start, "to": end, "day": rng.choice(DAYS)}
    content = json.dumps(record)
    sentence = rng.choice(SENTENCES[topic]).format(**record)
    fields = list(record.items())
    rng.shuffle(fields)
    answer = json.dumps(dict(fields))
    return Task("records", rng.choice(REQUESTS).format(sentence), answer, content)


def check(task: Task, text: str) -> list[Mark]:
    """Whether the text is a JSON object, then whether each field has the sentence's value."""
    truth = json.loads(task.answer)
    try:
        found = json.loads(text, object_pairs_hook=_fields)
    except (ValueError, RecursionError):
        found = None
    parses = isinstance(found, dict)
    marks = [Mark("JSON", parses)]
    if not parses:
        return marks
    for name, value in truth.items():
        same = type(found.get(name)) is type(value) and found[name] == value
        marks.append(Mark(name, same))
    return marks + [Mark(name, False) for name in found if name not in truth]


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields
