"""The command line: `codd-hf demo | generate | chat | train | evaluate | convert | bench`."""

from __future__ import annotations

import argparse
import ctypes
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
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
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


def _spare_page_faults() -> None:
    """Large tensors that are new at every step take huge pages, and memory that was kept.

    PyTorch reads its variable at the first large tensor. glibc, unless its own variables say
    something else, gives large blocks back to the system as soon as they are free.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 for a failure (bad usage leaves with 2)."""
    _spare_page_faults()
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
