"""The rows of a JSON, JSONL or text file, as they are written, and what becomes of bad ones.

Nothing guesses the type of a column: a date in quotes is a text. A byte order mark is no text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import shown

SAMPLE_BY = ("line", "paragraph", "document")
WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""By the byte order mark at a file's start; the longer ones first. Without one it is UTF-8."""
MARK = "\ufeff"
LISTED, LISTED_NUMBERS = 10, 200
"""So many bad rows are told with their reasons, and so many by their numbers."""


class BadRowError(ValueError):
    """What is wrong with one row, as the end of a sentence that begins with its number."""


@dataclass
class RowReport:
    """What became of the rows that gave no example.

    Attributes:
        source: where they are from, as a user named it.
        skip_bad_rows: leave bad rows out; otherwise the first one is an error.
        bad: their numbers and what is wrong with each.
        passed_over: the numbers of rows in which there is nothing to learn, by reason.
    """

    source: str
    skip_bad_rows: bool = False
    bad: dict[int, str] = field(default_factory=dict)
    passed_over: dict[str, list[int]] = field(default_factory=dict)

    def refuse(self, number: int, reason: str) -> None:
        """Notes a bad row.

        Raises:
            ValueError: bad rows are not to be skipped.
        """
        if not self.skip_bad_rows:
            raise ValueError(
                f"Row {number} of {self.source} {reason}: mend it, or leave bad rows out with "
                "`skip_bad_rows`."
            )
        self.bad[number] = reason

    def pass_over(self, number: int, reason: str) -> None:
        """Notes a row without anything to learn."""
        self.passed_over.setdefault(reason, []).append(number)

    def __bool__(self) -> bool:
        """Whether there are such rows."""
        return bool(self.bad or self.passed_over)

    def __str__(self) -> str:
        """Counts, numbers and reasons, a sentence a kind; empty if all rows gave an example."""
        said = [
            f"Of {self.source}, {_rows(numbers)} passed over: {reason}."
            for reason, numbers in self.passed_over.items()
        ]
        if self.bad:
            said.append(f"Of {self.source}, {_rows(list(self.bad))} left out as bad.")
            told = list(self.bad.items())[:LISTED]
            said += [f"Row {number} {reason}." for number, reason in told]
        return "\n".join(said)

    def tell(self) -> None:
        """Prints it, on the main process."""
        if self and PartialState().is_main_process:
            tqdm.write(str(self))


def _rows(numbers: list[int]) -> str:
    """`2 rows (4, 7) are`."""
    noun, verb = ("row", "is") if len(numbers) == 1 else ("rows", "are")
    listed = [str(number) for number in numbers[:LISTED_NUMBERS]]
    if len(numbers) > LISTED_NUMBERS:
        listed.append(f"and {len(numbers) - LISTED_NUMBERS} more")
    return f"{len(numbers)} {noun} ({', '.join(listed)}) {verb}"


def file_kind(source: str) -> str | None:
    """`.json`, `.jsonl` or `.txt`, also of a file that gzip has packed; None for any other."""
    suffix = Path(source.removesuffix(".gz")).suffix
    return suffix if suffix in (".json", ".jsonl", ".txt") else None


Row = tuple[int, "dict[str, Any] | BadRowError"]
"""A row's number, from 1, and its columns, or what is wrong where they should be."""


def read_rows(path: str, sample_by: str = "line") -> list[Row]:
    """All rows of a file, in order, numbered by lines where a row is a line.

    Rows of a .txt file have one column, `text`. Blank lines are no rows.

    Args:
        path: a .jsonl, .json (an array of objects, or as .jsonl) or .txt file, or one of these with
            .gz.
        sample_by: what is one text of a .txt file: a line, a paragraph (up to an empty line) or
            the whole document.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    kind = file_kind(path)
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            first = file.peek(4)[:4]
            wide = next((e for mark, e in WIDE_ENCODINGS.items() if first.startswith(mark)), None)
            if kind == ".jsonl" or (kind == ".txt" and sample_by == "line"):
                lines = file if wide is None else io.TextIOWrapper(file, wide)
                return list(_of_lines(lines, _object if kind == ".jsonl" else _line))
            text = file.read().decode(wide or "utf-8-sig").replace("\r\n", "\n")
        if kind == ".txt":
            parts = re.split(r"\n\n+", text) if sample_by == "paragraph" else [text]
            texts = (part.strip("\n") for part in parts)
            return list(enumerate(({"text": text} for text in texts if text.strip()), 1))
        return _of_json(text)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"`source` {path!r} cannot be read: {error}.") from error


def _of_lines(
    lines: Iterable[bytes | str], parse: Callable[[str], dict[str, Any]]
) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode() if isinstance(line, bytes) else line
            text = text.removeprefix(MARK)  # within a file too, where files were joined
            if text.strip():
                yield number, parse(text)
        except BadRowError as error:
            yield number, BadRowError(f"cannot be read: line {number} {error}")
        except (ValueError, RecursionError) as error:
            kind = "JSON" if parse is _object else "text"
            yield number, BadRowError(f"cannot be read: line {number} is not {kind} ({error})")


def _line(text: str) -> dict[str, str]:
    return {"text": text.rstrip("\r\n")}


def _object(text: str) -> dict[str, Any]:
    return _checked(json.loads(text))


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRowError(f"is not a JSON object ({shown(value)})")
    return value


def _of_json(text: str) -> list[Row]:
    """The rows of a .json file: of its array, or of its lines."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError:
        if text.lstrip().startswith("["):
            raise  # a damaged array, of which lines would say little
        return list(_of_lines(text.split("\n"), _object))
    rows = []
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        try:
            rows.append((number, _checked(row)))
        except BadRowError as error:
            rows.append((number, error))
    return rows
