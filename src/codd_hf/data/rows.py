"""The rows of a JSON, JSONL or text file, as they are written, and the report on bad ones.

Nothing guesses the type of a column: a date in quotes is a text. A byte order mark is no text.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import shown

SAMPLE_BY = ("line", "paragraph", "document")
WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins as the mark of utf-16 does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK = "\ufeff"
LISTED, LISTED_NUMBERS = 10, 200
"""So many bad rows are told with their reasons, and so many by their numbers."""

Row = tuple[int, "dict[str, Any] | BadRowError"]
"""A row's number, from 1, and its columns, or what is wrong where they should be."""


class BadRowError(ValueError):
    """What is wrong with one row, as the end of a sentence that begins with its number."""


@dataclass
class RowReport:
    """The rows that gave no example, and why.

    Attributes:
        source: where they are from, as a user named it.
        skip_bad_rows: leave bad rows out; otherwise the first one is an error.
        bad: the reason by the number of a row.
        passed_over: by reason, the numbers of rows in which there is nothing to learn.
    """

    source: str
    skip_bad_rows: bool = False
    bad: dict[int, str] = field(default_factory=dict)
    passed_over: dict[str, list[int]] = field(default_factory=dict)

    def refuse(self, number: int, reason: str) -> None:
        """Notes a bad row, or raises a ValueError if such rows are not to be skipped."""
        if not self.skip_bad_rows:
            raise ValueError(
                f"Row {number} of {self.source} {reason}: mend it, or leave bad rows out with "
                "`skip_bad_rows`."
            )
        self.bad[number] = reason

    def pass_over(self, number: int, reason: str) -> None:
        """Notes a row without anything to learn."""
        self.passed_over.setdefault(reason, []).append(number)

    def __str__(self) -> str:
        """Counts, numbers and reasons, a sentence a kind; empty if all rows gave an example."""
        groups = {f"passed over: {reason}": rows for reason, rows in self.passed_over.items()}
        if self.bad:
            groups["left out as bad"] = list(self.bad)
        said = []
        for what, rows in groups.items():
            noun = "row is" if len(rows) == 1 else "rows are"
            numbers = ", ".join(map(str, rows[:LISTED_NUMBERS]))
            more = ", ..." if len(rows) > LISTED_NUMBERS else ""
            said.append(f"Of {self.source}, {len(rows)} {noun} {what} ({numbers}{more}).")
        said += [f"Row {number} {reason}." for number, reason in list(self.bad.items())[:LISTED]]
        return "\n".join(said)


def tell(text: object) -> None:
    """Prints a text, unless it is empty, on the main process."""
    if str(text) and PartialState().is_main_process:
        tqdm.write(str(text))


def file_kind(source: str) -> str:
    """The suffix of a file, without the `.gz` of one that gzip has packed."""
    return Path(source.removesuffix(".gz")).suffix


def read_rows(path: str, sample_by: str = "line") -> list[Row]:
    """All rows of a file, in order, numbered by lines where a row is a line.

    Rows of a .txt file have one column, `text`. Blank lines are no rows.

    Args:
        path: a .jsonl, .json (an array of objects, or as .jsonl) or .txt file, or one of these with
            .gz.
        sample_by: one text of a .txt file is a line, a paragraph (up to an empty line) or the whole
            document.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    kind = file_kind(path)
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            raw = file.read()
        wide = next((e for mark, e in WIDE_ENCODINGS.items() if raw.startswith(mark)), None)
        # Bytes that are no UTF-8 become halves of surrogate pairs, which only their rows are about.
        text = raw.decode(wide) if wide else raw.decode("utf-8", "surrogateescape")
        if kind == ".json":
            return _array(text.removeprefix(MARK))
        if kind == ".jsonl":
            return list(_lines(text, _object, "JSON"))
        if sample_by == "line":
            return list(_lines(text, lambda line: {"text": line.rstrip("\r\n")}, "text"))
        text = text.removeprefix(MARK).replace("\r\n", "\n")
        parts = re.split(r"\n\n+", text) if sample_by == "paragraph" else [text]
        texts = (part.strip("\n") for part in parts if part.strip())
        return list(enumerate(({"text": text} for text in texts), 1))
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"`source` {path!r} cannot be read: {error}.") from error


def _lines(text: str, parse: Callable[[str], dict[str, Any]], kind: str) -> Iterator[Row]:
    lines = (line.removeprefix(MARK) for line in text.split("\n"))  # also where files were joined
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                line.encode()
                yield number, parse(line)
        except BadRowError as error:
            yield number, BadRowError(f"cannot be read: line {number} {error}")
        except (ValueError, RecursionError) as error:
            yield number, BadRowError(f"cannot be read: line {number} is not {kind} ({error})")


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise BadRowError(f"is not a JSON object ({shown(value)})")
    return value


def _array(text: str) -> list[Row]:
    """The rows of a .json file: of its array, or of its lines."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError:
        if text.lstrip().startswith("["):
            raise  # a damaged array, of which lines would say little
        return list(_lines(text, _object, "JSON"))
    rows = value if isinstance(value, list) else [value]
    return [
        (i, row if isinstance(row, dict) else BadRowError(f"is not a JSON object ({shown(row)})"))
        for i, row in enumerate(rows, 1)
    ]
