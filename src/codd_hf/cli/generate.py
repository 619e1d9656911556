"""`codd-hf generate`: text after a prompt."""

from __future__ import annotations

import argparse
import sys

from .common import add_decoding_arguments, decoding_arguments, load_pipeline, printable

HELP = "Generate text after prompts."
EXAMPLE = """example:
  codd-hf generate "Tom has 3 boxes of 12 eggs. He sells 10 eggs. How many eggs are left?" \\
      --num-inference-steps 16 --sampling latent --seed 1

prompts on standard input, one per line, when none is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="prompts")
    parser.add_argument("--model", help="path or Hub id; default: the embedded model")
    parser.add_argument(
        "--no-chat-template", action="store_true", help="the prompt is the text itself"
    )
    add_decoding_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("`prompt` is empty: give a prompt, or lines on standard input.")
    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
    output = pipeline(
        prompts,
        use_chat_template=not args.no_chat_template,
        generator=generators,
        **decoding_arguments(args),
    )
    for text in output.texts:
        print(printable(text))
