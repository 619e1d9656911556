"""What libraries raise while they read what a user or a repository gave, in one sentence.

Whatever the type of such an exception, it is about the file. The doors at which files are handed
to libraries (`reading`, `repositories.explained`) make a sentence of it. What this package raises
passes: its refusals are sentences already, its accidents are bugs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

PACKAGE = str(Path(__file__).parent)
LONGEST_REASON = 300


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
    text = " ".join(str(error).split()).rstrip(". ")
    if isinstance(error, OSError):
        text = text.partition(". ")[0]  # transformers goes on for paragraphs
    elif not isinstance(error, ValueError) and type(error).__module__ == "builtins":
        text = f"{type(error).__name__}: {text}"
    text = text or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


@contextmanager
def reading(what: str) -> Iterator[None]:
    """A door at which a file is read: what a library raises inside becomes one sentence.

    Args:
        what: is read, with the file's name; begins the sentence.

    Raises:
        OSError: a library could not read it. What this package raises passes as it is.
    """
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
