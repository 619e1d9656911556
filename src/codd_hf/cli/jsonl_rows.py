"""The rows of a JSONL file, read line by line."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..checks.arguments import shown
from ..checks.errors import reason

USUAL_PROMPTS = ("question", "prompt")
OF_A_ROW = ("gen_length", "num_inference_steps", "seed")
"""Columns that, where a line has them, are settings of its row."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SEEDS = range(-(2**63), 2**64)
"""That torch's generators take."""


@dataclass
class JSONLRows:
    """The rows of a JSONL file, of which only places and digests are kept in memory.

    Attributes:
        path: the file.
        prompt_column: the column of the prompts.
        offsets: where each row's line begins, in bytes.
        numbers: the number of each row's line, from 1.
        digests: of each row's line.
        sha256: of the file.
        bad: what is wrong with each row that cannot be read.
    """

    path: Path
    prompt_column: str
    offsets: array = field(default_factory=lambda: array("q"))
    numbers: array = field(default_factory=lambda: array("q"))
    digests: array = field(default_factory=lambda: array("Q"))
    sha256: str = ""
    bad: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    @classmethod
    def read(
        cls, path: Path, prompt_column: str | None = None, output_column: str | None = None
    ) -> JSONLRows:
        """Reads and checks all lines.

        Args:
            path: the file.
            prompt_column: the column of the prompts; default `question` or else `prompt`.
            output_column: a column that no row may have.

        Raises:
            ValueError: there is no row, or nothing says which column has the prompts.
            OSError: the file cannot be read.
        """
        if not path.is_file():
            raise FileNotFoundError(f"`source`: there is no file {str(path)!r}.")
        rows, columns, digest = cls(path, prompt_column), None, hashlib.sha256()
        with path.open("rb") as file:
            for number, offset, line in _lines(file):
                digest.update(line)
                text = line.removeprefix(BYTE_ORDER_MARK)
                if not text.strip():
                    continue
                rows.offsets.append(offset + len(line) - len(text))
                rows.numbers.append(number)
                rows.digests.append(_digest(text))
                try:
                    values = parsed(text)
                    columns = columns or list(values)
                    if rows.prompt_column is None:
                        rows.prompt_column = next((c for c in USUAL_PROMPTS if c in values), None)
                    if rows.prompt_column is not None:
                        _check(values, rows.prompt_column, output_column)
                except ValueError as error:
                    row = len(rows) - 1
                    rows.bad[row] = f"{rows.where(row)} {error}."
        rows.sha256 = digest.hexdigest()
        if not len(rows):
            raise ValueError(f"`source` {str(path)!r} has no rows.")
        if rows.prompt_column is None and columns is not None:
            raise ValueError(
                f"`prompt_column` must be given: neither question nor prompt is among the columns "
                f"{columns} of {str(path)!r}."
            )
        return rows

    def where(self, row: int) -> str:
        """A row's place, for a message."""
        return f"Line {self.numbers[row]} of {str(self.path)!r}"

    def line(self, file: BinaryIO, row: int) -> bytes:
        """A row's line, from the opened file.

        Raises:
            ValueError: it is not what it was when the file was read.
        """
        line = line_at(file, self.offsets[row])
        if _digest(line) != self.digests[row]:
            raise ValueError(
                f"{self.where(row)} has been changed while the file was answered: put the file "
                "back as it was and run the same command to go on, or give another `output`."
            )
        return line

    def values(self, row: int) -> dict[str, Any]:
        """The columns of a row; see `line` for what is raised."""
        with self.path.open("rb") as file:
            return parsed(self.line(file, row))


def line_at(file: BinaryIO, offset: int) -> bytes:
    """The line that begins at a byte."""
    file.seek(offset)
    return file.readline()


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: it holds none; goes on after the name of the line.
    """
    try:
        values = json.loads(line.decode(), object_pairs_hook=_Columns)
    except UnicodeDecodeError as error:
        raise ValueError(f"is no JSON object, for it is not in UTF-8: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON object: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"is no JSON object, but a {type(values).__name__}")
    if values.twice is not None:
        raise ValueError(f"must have each column once, got {values.twice!r} twice")
    return values


class _Columns(dict):
    """A JSON object, and the first of its keys that stands there `twice`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice, names = None, set()
        if len(self) < len(pairs):
            self.twice = next(n for n, _ in pairs if n in names or names.add(n))


def _check(values: dict[str, Any], prompt_column: str, output_column: str | None) -> None:
    prompt = values.get(prompt_column)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"must have a text in column {prompt_column!r}, got {shown(prompt)}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"must have a text in column {prompt_column!r}, got half a character "
            f"({prompt[error.start]!r}) after {error.start} characters"
        ) from error
    if output_column in values:
        raise ValueError(f"has a column {output_column!r} already: give another `output_column`")
    for name in OF_A_ROW:
        if type(values.get(name, 0)) is not int:
            raise ValueError(
                f"must have an integer in column {name!r}, which is a setting of its row, got "
                f"{values[name]!r}: rename a column that means something else"
            )
    if values.get("seed", 0) not in SEEDS:
        raise ValueError(f"must have a seed from -2**63 to 2**64 - 1, got {values['seed']}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), offset in bytes, and bytes of each line."""
    offset = 0
    for number, line in enumerate(file, start=1):
        yield number, offset, line
        offset += len(line)


def _digest(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest())
