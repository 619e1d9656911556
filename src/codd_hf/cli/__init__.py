"""The command line: `codd-hf demo | generate | chat | train | evaluate | convert | bench`."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Sequence

from . import bench, chat, convert, demo, evaluate, generate, train
from .messages import report

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (demo, generate, chat, train, evaluate, convert, bench)
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INTERRUPTED = 128 + 2  # what shells say of a program that SIGINT ended


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
            help=module.__doc__,
            description=module.__doc__,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=module.run, usage_error=subparser.error)
        subparser.add_argument(
            "--debug", action="store_true", help="show where an error comes from"
        )
        module.add_arguments(subparser)
    return parser


def _spare_page_faults() -> None:
    """New large tensors take huge pages, and glibc keeps large blocks that were freed."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 for a failure, which is one line on standard error; 130 after Ctrl-C. Bad usage leaves
        with 2.
    """
    _spare_page_faults()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()  # else a full disk would be noticed after the end, as no failure
    except KeyboardInterrupt:
        print(f"codd-hf {args.command}: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left, and said with that all there is to say.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers' panics are no `Exception`
        report(error, args.command, args.debug)
        return 1
    return 0
