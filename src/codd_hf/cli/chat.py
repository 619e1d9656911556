"""`codd-hf chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from ..checks.errors import reading
from .common import add_decoding_arguments, decoding_arguments, load_pipeline
from .printing import one_line

HELP = "Talk with a model; its canvas is shown as it resolves."
EXAMPLE = """example:
  codd-hf chat --model me/my-coupled-model --num-inference-steps 16

Each line is a message, and the model sees all that was said before. /clear begins a new
conversation, /exit (or the end of the input) leaves, and Ctrl-C stops an answer. Where standard
output is no terminal, or NO_COLOR is set, each answer is printed once it is complete."""

PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="path or Hub id; default: the embedded model")
    parser.add_argument("--system", metavar="TEXT", help="a first message of the system")
    add_decoding_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from .terminal import write_answer

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    if not getattr(pipeline.tokenizer, "chat_template", None):
        raise ValueError(
            f"`--model` {args.model!r} has no chat template: use `codd-hf generate` with it."
        )
    interactive = sys.stdin.isatty()
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    conversation = list(opening)
    for turn, line in enumerate(_lines(interactive)):
        if line == "/exit":
            return
        if line == "/clear":
            conversation = list(opening)
            continue
        messages = [*conversation, {"role": "user", "content": line}]
        try:
            answer = write_answer(
                pipeline,
                messages=messages,
                generator=torch.Generator().manual_seed(args.seed + turn),
                **decoding_arguments(args),
            )
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("(stopped: the message is forgotten)")
        except ValueError as error:
            if not interactive:
                raise
            print(f"{one_line(str(error))} (the message is forgotten; /clear begins anew)")
        else:
            conversation = [*messages, {"role": "assistant", "content": answer}]


def _lines(interactive: bool) -> Iterator[str]:
    """What the user writes, without blank lines."""
    if interactive:
        with contextlib.suppress(ImportError):  # On Windows the console does this.
            # Imported for its effect: `input` then lets lines be edited and recalled.
            import readline  # noqa: F401
    while True:
        try:
            with reading("Standard input"):
                line = input(PROMPT if interactive else "").strip()
        except EOFError:
            return
        if line:
            yield line
