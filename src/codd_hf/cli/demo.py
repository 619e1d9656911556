"""Show factorized and coupled text side by side, at the same number of passes."""

import argparse
import shutil
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from ..checks.errors import printable
from ..checks.settings import Count, Seed, Settings
from .common import add_flags, load_pipeline, settings_from

EXAMPLE = """example:
  codd-hf demo
  codd-hf demo --num-inference-steps 8 --seed 3"""


@dataclass
class DemoSettings(Settings):
    """The settings of a demonstration."""

    model: str | None = None
    """a pipeline with `demo.jsonl`; default: the embedded one"""
    num_questions: Count = 3
    """held-out questions"""
    gen_length: Count = 128
    """tokens to generate"""
    num_inference_steps: Count = 32
    """backbone passes for the whole text"""
    seed: Seed = 0
    """of all draws"""


add_arguments = partial(add_flags, kind=DemoSettings)


def run(args: argparse.Namespace) -> None:
    """Answers each question twice."""
    settings = settings_from(args, DemoSettings)
    import torch

    from ..data.sources import load_examples
    from ..hub.repositories import default_model

    examples = load_examples(Path(settings.model or default_model(), "demo.jsonl"))
    questions = [example.prompt for example in examples[: settings.num_questions]]
    pipeline = load_pipeline(settings.model)
    pipeline.set_progress_bar_config(disable=True)
    texts, report = {}, []
    modes = {"factorized": "factorized", "CoDD": pipeline.scheduler.config.sampling}
    for name, sampling in modes.items():
        started = time.perf_counter()
        output = pipeline(
            questions,
            gen_length=settings.gen_length,
            num_inference_steps=settings.num_inference_steps,
            sampling=sampling,
            generator=[
                torch.Generator().manual_seed(settings.seed + i) for i in range(len(questions))
            ],
        )
        seconds = time.perf_counter() - started
        texts[name] = [printable(text) for text in output.texts or ()]
        report.append(f"{name} {output.num_passes} passes, {seconds:.1f} s")
    width = max(min(shutil.get_terminal_size((100, 20)).columns, 120), 60)
    for i, question in enumerate(questions):
        print(textwrap.fill(f"Question {i + 1}: {printable(question)}", width), end="\n\n")
        print(side_by_side({name: answers[i] for name, answers in texts.items()}, width))
        print()
    print(
        f"Up to {settings.gen_length} tokens for each of {len(questions)} questions in at most "
        f"{settings.num_inference_steps} passes: {'; '.join(report)}."
    )


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Two texts by title in columns of equal width."""
    column, sides = (width - 3) // 2, []
    for title, text in texts.items():
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]]
        sides.append([title, "-" * column, *lines])
    pairs = zip_longest(*sides, fillvalue="")
    return "\n".join(f"{left:<{column}} | {right}".rstrip() for left, right in pairs)
