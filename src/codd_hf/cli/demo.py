"""`codd-hf demo`: factorized and coupled text, side by side, from the embedded model."""

from __future__ import annotations

import argparse
import shutil
import textwrap
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ..checks.settings import Count, Seed, Settings
from .common import load_pipeline, printable
from .options import add_flags, settings_from

HELP = "Show factorized and coupled text side by side, at the same number of passes."
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DemoSettings)


def run(args: argparse.Namespace) -> None:
    settings = settings_from(args, DemoSettings)
    import torch

    from ..hub.defaults import default_model
    from .jsonl_rows import PromptRows

    folder = Path(settings.model or default_model())
    if not (folder / "demo.jsonl").is_file():
        raise ValueError(f"`--model`: {str(folder)!r} has no `demo.jsonl` with held-out questions.")
    found = PromptRows.read(folder / "demo.jsonl", "question")
    for fault in found.bad.values():
        raise ValueError(fault)
    questions = [row["question"] for _, row in found.rows[: settings.num_questions]]
    pipeline = load_pipeline(settings.model)
    pipeline.set_progress_bar_config(disable=True)

    texts, report = {}, []
    modes = {"factorized": "factorized", "CoDD": pipeline.scheduler.config.sampling}
    for name, sampling in modes.items():
        generators = [
            torch.Generator().manual_seed(settings.seed + i) for i in range(len(questions))
        ]
        started = time.perf_counter()
        output = pipeline(
            questions,
            gen_length=settings.gen_length,
            num_inference_steps=settings.num_inference_steps,
            sampling=sampling,
            generator=generators,
        )
        seconds = time.perf_counter() - started
        texts[name] = [printable(text) for text in output.texts]
        report.append(f"{name} {output.num_passes} passes, {seconds:.1f} s")

    width = max(min(shutil.get_terminal_size((100, 20)).columns, 120), 60)
    for i, question in enumerate(questions):
        print(textwrap.fill(f"Question {i + 1}: {printable(question)}", width), end="\n\n")
        print(side_by_side("factorized", texts["factorized"][i], "CoDD", texts["CoDD"][i], width))
        print()
    print(
        f"Up to {settings.gen_length} tokens for each of {len(questions)} questions in at most "
        f"{settings.num_inference_steps} passes: {'; '.join(report)}."
    )


def side_by_side(left_title: str, left: str, right_title: str, right: str, width: int) -> str:
    """Two texts in columns of equal width."""
    column = (width - 3) // 2

    def wrapped(title: str, text: str) -> list[str]:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]]
        return [title, "-" * column, *lines]

    pairs = zip_longest(wrapped(left_title, left), wrapped(right_title, right), fillvalue="")
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in pairs)
