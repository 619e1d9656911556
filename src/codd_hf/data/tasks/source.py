"""Tasks of all kinds by seed, and the split that keeps test tasks unseen."""

import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from random import Random

from ...checks.arguments import choice
from . import dates, ordering, records, sums, word_problems
from .task import Mark, Task

TASKS = "tasks"
"""Their name where a dataset is asked for."""
SAMPLE_SIZE = 20_000
"""Tasks of a finite sample, if nobody says how many."""
KINDS = {
    "records": records,
    "ordering": ordering,
    "sums": sums,
    "word problems": word_problems,
    "dates": dates,
}
SHARES = {"records": 2, "ordering": 3, "sums": 3, "word problems": 4, "dates": 1}
"""How often each kind is drawn when all are: the harder, the more often."""
SPLITS = {"test": 0.05, "validation": 0.1, "train": 1.0}
"""Where each split ends in the unit interval into which contents are hashed."""


def split_of(task: Task) -> str:
    """`train`, `validation` or `test`: a function of the content alone, whatever the wording."""
    digest = blake2b(f"{task.kind}: {task.content}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return next(name for name, end in SPLITS.items() if place < end)


def draw_tasks(
    split: str = "train", seed: int | str = 0, kinds: Sequence[str] = ()
) -> Iterator[Task]:
    """Tasks of a split without end, always the same ones for the same arguments.

    Each kind has its share of `SHARES`; no `kinds` are all. A split or kind that is not there is a
    ValueError.
    """
    choice("split", split, [*SPLITS])
    for kind in kinds:
        choice("kinds", kind, [*KINDS])
    return _tasks(split, Random(f"{seed} {split}"), list(kinds or KINDS))


def _tasks(split: str, rng: Random, kinds: list[str]) -> Iterator[Task]:
    shares = [SHARES[kind] for kind in kinds]
    while True:
        kind = KINDS[rng.choices(kinds, shares)[0]]
        task = kind.draw(rng)
        while split_of(task) != split:
            task = kind.draw(rng)
        yield task


def sample_tasks(split: str = "train", kinds: str | None = None) -> list[Task]:
    """A finite sample, for those who name their data by strings.

    The split may have a number of tasks, as `test[:100]`; kinds have commas between, None is all.
    """
    found = re.fullmatch(r"([a-z]+)(?:\[:([1-9][0-9]{0,8})\])?", split)
    if found is None:
        raise ValueError(
            f"`split` of {TASKS!r} must look like 'train' or 'train[:1000]', got {split!r}."
        )
    tasks = draw_tasks(found[1], kinds=kind_names(kinds))
    return list(islice(tasks, int(found[2] or SAMPLE_SIZE)))


def kind_names(kinds: str | None) -> list[str]:
    """The names in a string with commas between; none of None."""
    return [] if kinds is None else [name.strip() for name in kinds.split(",")]


def is_right(task: Task, text: str) -> bool:
    """Whether an answer is right."""
    return KINDS[task.kind].check(task, text)


def marks(task: Task, text: str) -> list[Mark]:
    """Whether each value, equation and result in an answer is right, in the order of the text."""
    return KINDS[task.kind].marks(task, text)
