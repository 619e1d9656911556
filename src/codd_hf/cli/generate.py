"""Generate text after prompts."""

import argparse
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..checks.errors import printable, reading
from ..checks.settings import Count, Seed
from .common import (
    AnsweringSettings,
    add_flags,
    answering_pipeline,
    decoding_arguments,
    settings_from,
    write_answer,
)

EXAMPLE = """example:
  codd-hf generate "Ben has 3 boxes with 4 eggs in each. How many eggs are there?" \\
      --num-inference-steps 16 --sampling latent --seed 1 --stream
  codd-hf generate --input questions.jsonl --output answers.jsonl --batch-size 16
  accelerate launch --multi_gpu --num_processes 4 -m codd_hf.cli generate \\
      --input questions.jsonl --output answers.jsonl
  codd-hf generate --infill "Tom has 3<|mask|><|mask|><|mask|> and eats 2."

Without prompts, they are the lines of standard input. Row i (from 0) of `--input` is drawn with
seed SEED + i, unless it has columns gen_length, num_inference_steps or seed of its own; a run that
was killed is continued by the same command. `--multi_gpu` needs no GPU."""


@dataclass
class GenerateSettings(AnsweringSettings):
    """The settings beside those of decoding."""

    prompt: list[str] = field(default_factory=list)
    """prompts"""
    seed: Seed = 0
    """of the first prompt; that of each further one is larger by one"""
    chat_template: bool = True
    """whether a prompt becomes a user's message; else it is the text itself"""
    infill: bool = False
    """fill the mask tokens in the prompts, add nothing"""
    stream: bool = False
    """show the canvas as it resolves (in a terminal)"""
    input: str | None = None
    """a JSONL file with a prompt in every line"""
    output: str | None = None
    """a JSONL file for its lines with one more column"""
    prompt_column: str | None = None
    """of the input; default: question, or else prompt"""
    output_column: str = "generated_text"
    """the new column"""
    batch_size: Count = 8
    """rows of the input at once"""
    skip_bad_rows: bool = False
    """leave out rows that cannot be answered, and list them; default: they are an error"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.input is None) != (self.output is None):
            raise ValueError("`--input` and `--output` go together: give both or neither.")
        if self.input is not None and (self.prompt or self.stream):
            raise ValueError("`--input` takes neither prompts nor `--stream`: leave them out.")


add_arguments = partial(add_flags, kind=GenerateSettings, positional=("prompt",), decoding=True)


def run(args: argparse.Namespace) -> None:
    """Answers prompts, or the rows of a file."""
    settings = settings_from(args, GenerateSettings)
    call = decoding_arguments(args) | {
        "use_chat_template": settings.chat_template,
        "infill": settings.infill,
    }
    if settings.input is not None:
        _run_on_file(settings, call)
        return
    import torch

    with reading("Standard input"):
        prompts = settings.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("`prompt` is empty: give a prompt, or lines on standard input.")
    pipeline = answering_pipeline(settings, call)
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=settings.stream or not sys.stderr.isatty())
    if settings.stream:
        for prompt, generator in zip(prompts, generators, strict=True):
            write_answer(pipeline, prompt=prompt, generator=generator, **call)
        return
    for text in pipeline(prompts, generator=generators, **call).texts or ():
        print(printable(text))


def _run_on_file(settings: GenerateSettings, call: dict[str, Any]) -> None:
    import torch
    from accelerate import PartialState

    from .jsonl import answer_jsonl

    # Without a GPU accelerate counts the processes of a launcher only if it is told to use the CPU.
    state = PartialState(cpu=not torch.cuda.is_available())
    pipeline = answering_pipeline(settings, call, state.device)
    pipeline.set_progress_bar_config(disable=True)
    number, report = answer_jsonl(pipeline, settings, call, state)
    if report.left_out:
        print(printable(str(report)), file=sys.stderr)
    who = f"process {state.process_index}: " if state.num_processes > 1 else ""
    what = "is complete" if os.path.exists(str(settings.output)) else "waits for other processes"
    print(f"{who}{number} rows answered now; {settings.output} {what}.")
    state.destroy_process_group()
