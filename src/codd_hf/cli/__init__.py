"""The command line: `codd-hf demo | generate | chat | train | evaluate | convert | bench`."""

import argparse
import contextlib
import ctypes
import dis
import io
import os
import sys
import traceback
from collections.abc import Sequence

from ..checks.errors import innermost, one_line, printable
from . import bench, chat, convert, demo, evaluate, generate, train

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (demo, generate, chat, train, evaluate, convert, bench)
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INTERRUPTED = 128 + 2  # what shells say of a program that SIGINT ended
RAISE = dis.opmap["RAISE_VARARGS"]
REFUSALS = (ValueError, TypeError, FloatingPointError, ImportError)


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


def is_refusal(error: BaseException) -> bool:
    """Whether an exception is about a user's value, a file or the machine; else it is a bug.

    A check refuses with a `raise` statement; an accident (`None + 1`, a missing key) is raised by
    the interpreter. What libraries raise while they read a file is a refusal already (see
    `checks.errors`).
    """
    if isinstance(error, (OSError, MemoryError)):
        return True
    if isinstance(error, RuntimeError):
        # torch has no type of its own for memory that a processor lacks.
        from accelerate.utils.memory import should_reduce_batch_size

        return should_reduce_batch_size(error)
    last = innermost(error)
    on_purpose = last is None or last.tb_frame.f_code.co_code[last.tb_lasti] == RAISE
    return isinstance(error, REFUSALS) and on_purpose


def report(error: BaseException, command: str, debug: bool = False) -> None:
    """Prints an error of a command to standard error: one line, or a bug with its traceback."""
    refusal, shown = is_refusal(error), traceback.format_exception(error)
    traceback.clear_frames(error.__traceback__)  # progress bars write their last before the line
    if debug or not refusal:
        print(printable("".join(shown)), file=sys.stderr)
    line = f"error: {one_line(str(error)) or type(error).__name__}"
    if not refusal:
        line = "this is a bug in codd-hf: please report it to the project, with the lines above."
    print(f"codd-hf {command}: {line}", file=sys.stderr)
