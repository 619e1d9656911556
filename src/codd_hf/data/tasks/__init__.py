"""Small tasks without end, each with a checker: what a tiny model can get right, and be seen to.

A kind of task is a file with `draw(rng)`, which makes one, and `check(task, text)`, which marks the
parts of an answer. Contents are hashed into splits, so that no test task was ever trained on.
"""

from .source import KINDS, TASKS, check, draw_tasks, is_right, kind_names, sample_tasks, split_of
from .task import Mark, Task

__all__ = [
    "KINDS",
    "TASKS",
    "Mark",
    "Task",
    "check",
    "draw_tasks",
    "is_right",
    "kind_names",
    "sample_tasks",
    "split_of",
]
