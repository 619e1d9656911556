"""Text of models, files and repositories, made harmless for a terminal."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..checks.errors import printable

COLOUR = re.compile(r"\x1b\[[\d;]*m")
LONGEST_LINE = 1200


def one_line(text: str) -> str:
    """A message in one line, without its middle where it is very long."""
    text = printable(" ".join(text.split()))
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


@contextmanager
def printing_safely() -> Iterator[None]:
    """Text of files and repositories in warnings and logs cannot control the terminal.

    Characters that the encoding of standard output lacks are printed as escapes.
    """
    format_warning, make_record = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = lambda *args, **kwargs: printable(format_warning(*args, **kwargs))
    logging.setLogRecordFactory(_PrintableRecord)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        warnings.formatwarning = format_warning
        logging.setLogRecordFactory(make_record)


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(COLOUR.sub("", super().getMessage()))
