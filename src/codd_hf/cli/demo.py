"""Answer small tasks factorized and coupled, in equally few passes, and mark what is right."""

from __future__ import annotations

import argparse
import shutil
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

from ..checks.errors import printable
from ..checks.settings import Count, Seed, Settings
from ..evaluation import FACTORIZED, AnsweringSettings
from .common import add_flags, load_pipeline, settings_from

if TYPE_CHECKING:
    from ..data.tasks import Task

EXAMPLE = """example:
  codd-hf demo
  codd-hf demo --passes 8 --seed 3"""
SHOWN = 4
"""Tasks that are printed, each of another kind."""
BATCH = 25
MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}


@dataclass
class DemoSettings(Settings):
    """The settings of a demonstration."""

    model: str | None = None
    """a pipeline that `codd-hf train --dataset tasks` left; default: the embedded one"""
    num_tasks: Count = 100
    """unseen tasks"""
    passes: Count = 4
    """backbone passes a window; of a block-causal backbone, one for each block at least"""
    seed: Seed = 0
    """of all draws"""


add_arguments = partial(add_flags, kind=DemoSettings)


def run(args: argparse.Namespace) -> None:
    """Answers each task twice."""
    settings = settings_from(args, DemoSettings)
    from ..data.tasks import draw_tasks, is_right
    from ..evaluation.answer_sets import AnswerSet, block_length

    tasks = list(islice(draw_tasks("test", settings.seed), settings.num_tasks))
    pipeline = load_pipeline(settings.model)
    if pipeline.model.coupling_head is None:
        raise ValueError("`--model` has no head to show: fit one with `codd-hf train`.")
    pipeline.set_progress_bar_config(disable=True)
    answering = AnsweringSettings(batch_size=BATCH, seed=settings.seed)
    answered = AnswerSet("demo", pipeline, [task.question for task in tasks], answering)
    number = max(settings.passes, -(-pipeline.model.window_length // block_length(pipeline)))
    modes = {FACTORIZED: FACTORIZED, "CoDD": pipeline.scheduler.config.sampling}
    texts, counts = {}, []
    for name, sampling in modes.items():
        started = time.perf_counter()
        texts[name] = [answer.text for answer in answered.answers(number, sampling)]
        seconds = time.perf_counter() - started
        right = sum(map(is_right, tasks, texts[name]))
        counts.append(f"{name} {right} right in {seconds:.1f} s")
    first: dict[str, int] = {}
    for place, task in enumerate(tasks):
        first.setdefault(task.kind, place)
    width = max(min(shutil.get_terminal_size((100, 20)).columns, 120), 60)
    for place in [*first.values()][:SHOWN]:
        task = tasks[place]
        print(textwrap.fill(f"{task.kind.capitalize()}: {task.question}", width), end="\n\n")
        both = {name: marked(task, answer[place]) for name, answer in texts.items()}
        print(side_by_side(both, width), end="\n\n")
    passes = f"{number} pass{'es' * (number > 1)} a window"
    print(f"{len(tasks)} unseen tasks, {passes}: {', '.join(counts)}")


def marked(task: Task, text: str) -> str:
    """An answer with a mark behind each part of it, and a verdict in the last line."""
    from ..data.tasks import is_right, marks

    verdict = is_right(task, text)
    for mark in reversed(marks(task, text)):
        text = f"{text[: mark.end]} {MARKS[mark.is_right]}{text[mark.end :]}"
    return f"{printable(text)}\n{MARKS[verdict]} {'right' if verdict else 'wrong'}"


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Two texts by title in columns of equal width."""
    column, sides = (width - 3) // 2, []
    for title, text in texts.items():
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]]
        sides.append([title, "-" * column, *lines])
    pairs = zip_longest(*sides, fillvalue="")
    return "\n".join(f"{left:<{column}} | {right}".rstrip() for left, right in pairs)
