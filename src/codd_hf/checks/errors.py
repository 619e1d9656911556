"""Exceptions of libraries that read what a user or a repository gave, told in one sentence.

Exceptions of this package pass: its refusals are sentences already, and its accidents are bugs.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

PACKAGE = str(Path(__file__).parents[1])
LONGEST_REASON = 300
# All but newline and tab of what moves a cursor, and what reorders the text after it.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text without terminal control sequences (newline and tab stay)."""
    return CONTROLS.sub("", text)


def one_line(text: str) -> str:
    """A text in one line, of characters that cannot control the terminal."""
    return printable(" ".join(text.split()))


def is_of_a_library(error: BaseException) -> bool:
    """Whether a library raised an exception: outside this package, or of a type of its own."""
    kind = type(error).__module__.partition(".")[0]
    if kind not in ("builtins", __name__.partition(".")[0]):
        return True  # among them the panics of tokenizers, which are no `Exception`
    last = innermost(error)
    outside = last is not None and not last.tb_frame.f_code.co_filename.startswith(PACKAGE)
    return outside and isinstance(error, Exception)


def reason(error: BaseException) -> str:
    """What an exception says, in one short line, with its type where the text alone says little."""
    text = one_line(str(error)).rstrip(". ")
    if isinstance(error, OSError):
        text = text.partition(". ")[0]  # transformers goes on for paragraphs
    elif not isinstance(error, ValueError) and type(error).__module__ == "builtins":
        text = f"{type(error).__name__}: {text}"
    text = text or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Makes an OSError of one sentence, which `what` begins, of what a library raises inside."""
    try:
        yield
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        raise OSError(f"{what} cannot be read: {reason(error)}.") from error


def innermost(error: BaseException) -> TracebackType | None:
    """Where an exception was raised."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last
