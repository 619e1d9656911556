"""A sentence becomes a JSON object; its fields may come in any order."""

import json
import re
from random import Random

from .task import NAMES, THINGS, Mark, Task

CITIES = [
    "Berlin", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Rome", "Tokyo",
]  # fmt: skip
JOBS = ["baker", "cook", "doctor", "farmer", "nurse", "painter", "pilot", "teacher"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
AGE, COUNT = range(20, 60), range(2, 21)
REQUESTS = ("Write as JSON: {}", "{} Give this as JSON.", "Turn into JSON: {}", "JSON of this: {}")
SENTENCES = {
    "person": (
        "{name} is a {job} of {age}.",
        "{name}, {age}, works as a {job}.",
        "The {job} {name} is {age} years old.",
    ),
    "order": (
        "{name} orders {count} {item}.",
        "{count} {item} go to {name}.",
        "There are {count} {item} for {name}.",
    ),
    "trip": (
        "{name} goes to {city} on {day}.",
        "On {day} {name} travels to {city}.",
        "{name} will be in {city} on {day}.",
    ),
}
FIELD = re.compile(r'"([^"]*)": *("[^"]*"|[^\s",}]+)')


def draw(rng: Random) -> Task:
    """A task about a person, an order or a trip."""
    topic = rng.choice(list(SENTENCES))
    record: dict[str, str | int] = {"name": rng.choice(NAMES)}
    if topic == "person":
        record |= {"age": rng.choice(AGE), "job": rng.choice(JOBS)}
    elif topic == "order":
        record |= {"count": rng.choice(COUNT), "item": rng.choice(THINGS)}
    else:
        record |= {"city": rng.choice(CITIES), "day": rng.choice(DAYS)}
    content = json.dumps(record)
    sentence = rng.choice(SENTENCES[topic]).format(**record)
    fields = list(record.items())
    rng.shuffle(fields)
    answer = json.dumps(dict(fields))
    return Task("records", rng.choice(REQUESTS).format(sentence), answer, content)


def check(task: Task, text: str) -> bool:
    """Whether the text is a JSON object with the sentence's fields and values, and no others."""
    return _fields(text) == _fields(task.answer)


def marks(task: Task, text: str) -> list[Mark]:
    """A mark of each value."""
    fields = FIELD.findall(task.answer)
    return [Mark(field.end(), field.groups() in fields) for field in FIELD.finditer(text)]


def _fields(text: str) -> str | None:
    """The fields of a JSON object by name, as Python writes them: 1, 1.0 and true are not alike."""
    try:
        return repr(json.loads(text, object_pairs_hook=sorted))
    except (ValueError, TypeError, RecursionError):
        return None
