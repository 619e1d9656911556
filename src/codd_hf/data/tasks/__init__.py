"""Small tasks without end, each with a checker: what a tiny model can get right, and be seen to.

A kind of task is a file with `draw(rng)`, which makes one, `check(task, text)`, which says whether
an answer is right, and `marks(task, text)`, which says it of its parts. Contents are hashed into
splits: no test task was ever trained on.
"""

from .source import (
    KINDS,
    TASKS,
    draw_tasks,
    is_right,
    kind_names,
    marks,
    sample_tasks,
    split_of,
)
from .task import Mark, Task

__all__ = [
    "KINDS",
    "TASKS",
    "Mark",
    "Task",
    "draw_tasks",
    "is_right",
    "kind_names",
    "marks",
    "sample_tasks",
    "split_of",
]
