"""Errors of the command line: one line, of characters that cannot control the terminal.

A check refuses with a `raise` statement; an accident (`None + 1`, a missing key) is raised by the
interpreter. So a ValueError that was raised on purpose is about a user's value, and one that
happened is a bug. What libraries raise while they read a file is a refusal already (see
`checks.errors`).
"""

from __future__ import annotations

import dis
import sys
import traceback

from ..checks.errors import innermost, printable

RAISE = dis.opmap["RAISE_VARARGS"]
REFUSALS = (ValueError, TypeError, FloatingPointError, ImportError)


def one_line(text: str) -> str:
    """A message in one line, of characters that cannot control the terminal."""
    return printable(" ".join(text.split()))


def is_refusal(error: BaseException) -> bool:
    """Whether an exception is about a user's value, a file or the machine; else it is a bug."""
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
