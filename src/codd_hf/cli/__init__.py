"""The command line: `codd-hf demo | generate | chat | train | evaluate | convert | bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import bench, chat, convert, demo, evaluate, generate, train

COMMANDS = {
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "train": train,
    "evaluate": evaluate,
    "convert": convert,
    "bench": bench,
}
FAILURES = (OSError, ValueError, TypeError, FloatingPointError)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `codd-hf`."""
    parser = argparse.ArgumentParser(
        prog="codd-hf",
        description="Coupled Discrete Diffusion: coherent text in a few parallel steps.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, usage_error=subparser.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 for a failure (bad usage leaves with 2)."""
    # PyTorch reads it at the first large tensor: those of a step are large, and new at every step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except FAILURES as error:
        print(f"codd-hf {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"codd-hf {args.command}: stopped", file=sys.stderr)
        return 1
    return 0
