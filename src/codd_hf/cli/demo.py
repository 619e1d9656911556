"""`codd-hf demo`: factorized and coupled text, side by side, from the embedded model."""

from __future__ import annotations

import argparse
import shutil
import textwrap
import time
from itertools import zip_longest
from pathlib import Path

from .common import count, load_pipeline, printable, seed

HELP = "Show factorized and coupled text side by side, at the same number of passes."
EXAMPLE = """example:
  codd-hf demo
  codd-hf demo --num-inference-steps 8 --seed 3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a pipeline with `demo.jsonl`; default: the embedded one")
    parser.add_argument("--num-questions", type=count, default=3, help="held-out questions")
    parser.add_argument("--gen-length", type=int, default=128, help="tokens to generate")
    parser.add_argument(
        "--num-inference-steps", type=int, default=32, help="backbone passes for the whole text"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of all draws")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..hub.defaults import default_model
    from .jsonl_rows import PromptRows

    folder = Path(args.model or default_model())
    if not (folder / "demo.jsonl").is_file():
        raise ValueError(f"`--model`: {str(folder)!r} has no `demo.jsonl` with held-out questions.")
    found = PromptRows.read(folder / "demo.jsonl", "question")
    for fault in found.bad.values():
        raise ValueError(fault)
    questions = [row["question"] for _, row in found.rows[: args.num_questions]]
    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)

    texts, report = {}, []
    modes = {"factorized": "factorized", "CoDD": pipeline.scheduler.config.sampling}
    for name, sampling in modes.items():
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(questions))]
        started = time.perf_counter()
        output = pipeline(
            questions,
            gen_length=args.gen_length,
            num_inference_steps=args.num_inference_steps,
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
        f"Up to {args.gen_length} tokens for each of {len(questions)} questions in at most "
        f"{args.num_inference_steps} passes: {'; '.join(report)}."
    )


def side_by_side(left_title: str, left: str, right_title: str, right: str, width: int) -> str:
    """Two texts in columns of equal width."""
    column = (width - 3) // 2

    def wrapped(title: str, text: str) -> list[str]:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]]
        return [title, "-" * column, *lines]

    pairs = zip_longest(wrapped(left_title, left), wrapped(right_title, right), fillvalue="")
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in pairs)
