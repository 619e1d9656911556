"""Whose fault an exception is: of what a user, a file or the machine gave, or of this package.

A check refuses with a `raise` statement; an accident (`None + 1`, a missing key) is raised by the
interpreter. So a ValueError or a TypeError that was raised on purpose is about what was given, and
one that happened is a bug. What libraries raise while they read a file, of whatever type, is a
refusal before it comes here (see `errors`).
"""

from __future__ import annotations

import dis
import sys
import traceback

from ..checks.errors import innermost, printable, reason
from .printing import one_line

RAISE = dis.opmap["RAISE_VARARGS"]
REFUSALS = (ValueError, TypeError, FloatingPointError, ImportError)


def is_refusal(error: BaseException) -> bool:
    """Whether an exception is about what was given; else it is a bug."""
    if isinstance(error, (OSError, MemoryError)) or _is_lack_of_memory(error):
        return True
    return isinstance(error, REFUSALS) and _raised_on_purpose(error)


def report(error: BaseException, command: str, debug: bool = False) -> None:
    """Says on standard error what is wrong: in one line, or as a bug, with the traceback.

    Args:
        error: what ended the command.
        command: its name.
        debug: whether to show the traceback in any case.
    """
    refusal = is_refusal(error)
    shown = traceback.format_exception(error)
    traceback.clear_frames(error.__traceback__)  # progress bars write their last before the line
    if debug or not refusal:
        print(printable("".join(shown)), file=sys.stderr)
    said = f"error: {one_line(str(error)) or type(error).__name__}"
    if isinstance(error, MemoryError) or _is_lack_of_memory(error):
        said = (
            "error: there is not enough memory: take fewer rows at once, shorter texts, or a "
            f"smaller model ({one_line(reason(error))})."
        )
    if not refusal:
        said = "this is a bug in codd-hf: please report it to the project, with the lines above."
    print(f"codd-hf {command}: {said}", file=sys.stderr)


def _raised_on_purpose(error: BaseException) -> bool:
    last = innermost(error)
    return last is None or last.tb_frame.f_code.co_code[last.tb_lasti] == RAISE


def _is_lack_of_memory(error: BaseException) -> bool:
    # torch has no type of its own for memory that a processor lacks; accelerate knows the texts.
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)
