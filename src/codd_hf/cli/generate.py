"""`codd-hf generate`: text after a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..checks.errors import reading
from .common import add_decoding_arguments, decoding_arguments, load_pipeline, printable
from .printing import one_line

HELP = "Generate text after prompts."
EXAMPLE = """example:
  codd-hf generate "Tom has 3 boxes of 12 eggs. He sells 10 eggs. How many eggs are left?" \\
      --num-inference-steps 16 --sampling latent --seed 1 --stream
  codd-hf generate --input questions.jsonl --output answers.jsonl --batch-size 16
  accelerate launch --multi_gpu --num_processes 4 -m codd_hf.cli generate \\
      --input questions.jsonl --output answers.jsonl
  codd-hf generate --infill "Tom has 3<|mask|><|mask|><|mask|> and eats 2."

prompts on standard input, one per line, when none is given. With `--input`, row i (from 0) is drawn
with seed SEED + i, so that its answer depends neither on `--batch-size` nor on the number of
processes; a run that was killed is continued by the same command. A line may have columns
gen_length, num_inference_steps and seed of its own. `--multi_gpu` starts several processes without
a GPU as well. With `--infill` a prompt is a text with mask tokens (here of the embedded model),
printed with the gaps filled."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="prompts")
    parser.add_argument("--model", help="path or Hub id; default: the embedded model")
    parser.add_argument(
        "--no-chat-template", action="store_true", help="the prompt is the text itself"
    )
    parser.add_argument(
        "--stream", action="store_true", help="show the canvas as it resolves (in a terminal)"
    )
    parser.add_argument(
        "--infill", action="store_true", help="fill the mask tokens in the prompts, add nothing"
    )
    add_decoding_arguments(parser)
    group = parser.add_argument_group("files")
    group.add_argument("--input", metavar="JSONL", help="a file with a prompt in every line")
    group.add_argument("--output", metavar="JSONL", help="its lines with one more column")
    group.add_argument("--prompt-column", help="default: question, or else prompt")
    group.add_argument("--output-column", default="generated_text", help="default: generated_text")
    group.add_argument("--batch-size", type=int, default=8, help="rows at once (default: 8)")
    group.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that cannot be answered, and list them; default: they are an error",
    )


def run(args: argparse.Namespace) -> None:
    if (args.input is None) != (args.output is None):
        args.usage_error("`--input` and `--output` go together: give both or neither.")
    if args.input is not None:
        if args.prompt or args.stream:
            args.usage_error("`--input` takes neither prompts nor `--stream`: leave them out.")
        _run_on_file(args)
        return
    if args.skip_bad_rows:
        args.usage_error("`--skip-bad-rows` is about the rows of `--input`: give one.")
    import torch

    from .terminal import can_redraw, write_answer

    with reading("Standard input"):
        prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("`prompt` is empty: give a prompt, or lines on standard input.")
    pipeline = load_pipeline(args.model)
    call = _call(args)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
    if args.stream and can_redraw(sys.stdout):
        pipeline.set_progress_bar_config(disable=True)
        for prompt, generator in zip(prompts, generators, strict=True):
            write_answer(pipeline, prompt=prompt, generator=generator, **call)
        return
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    for text in pipeline(prompts, generator=generators, **call).texts:
        print(printable(text))


def _call(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments."""
    return {
        "use_chat_template": not args.no_chat_template,
        "infill": args.infill,
        **decoding_arguments(args),
    }


def _run_on_file(args: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState

    from .jsonl import answer_jsonl

    # Without a GPU accelerate counts the processes of a launcher only if it is told to use the CPU.
    state = PartialState(cpu=not torch.cuda.is_available())
    pipeline = load_pipeline(args.model, device=state.device)
    pipeline.set_progress_bar_config(disable=True)
    skipped: list[str] = []
    number = answer_jsonl(
        pipeline,
        args.input,
        args.output,
        prompt_column=args.prompt_column,
        output_column=args.output_column,
        batch_size=args.batch_size,
        seed=args.seed,
        state=state,
        progress=sys.stderr.isatty(),
        skip=skipped.append if args.skip_bad_rows else None,
        **_call(args),
    )
    state.destroy_process_group()
    for said in skipped:
        print(f"codd-hf generate: skipped: {one_line(said)}", file=sys.stderr)
    who = f"process {state.process_index}: " if state.num_processes > 1 else ""
    what = "is complete" if Path(args.output).exists() else "waits for other processes"
    left_out = f", {len(skipped)} skipped" if skipped else ""
    print(f"{who}{number} rows answered now{left_out}; {args.output} {what}.")
