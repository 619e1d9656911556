"""The rows of a JSONL file, with their line numbers, and why some cannot be used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks.arguments import shown
from ..checks.errors import reason

USUAL_PROMPTS = ("question", "prompt")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class JSONLRows:
    """The rows of a JSONL file.

    Attributes:
        path: the file.
        prompt_column: the column of the prompts.
        lines: each row's line, without its end.
        numbers: the number of each row's line, from 1.
        sha256: of the file.
        bad: why a row cannot be used, by row.
    """

    path: Path
    prompt_column: str | None
    lines: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    sha256: str = ""
    bad: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    @classmethod
    def read(
        cls, path: Path, prompt_column: str | None = None, output_column: str | None = None
    ) -> JSONLRows:
        """Reads a file once and checks its rows; blank lines are no rows.

        Args:
            path: the file.
            prompt_column: default `question` or else `prompt`.
            output_column: a column that no row may have.

        Raises:
            ValueError: there is no row, or nothing says which column has the prompts.
            OSError: the file cannot be read.
        """
        if not path.is_file():
            raise FileNotFoundError(f"`source`: there is no file {str(path)!r}.")
        rows, digest, columns = cls(path, prompt_column), hashlib.sha256(), []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line := line.removeprefix(BYTE_ORDER_MARK).rstrip():
                    rows.lines.append(line)
                    rows.numbers.append(number)
        if not rows.lines:
            raise ValueError(f"`source` {str(path)!r} has no rows.")
        rows.sha256 = digest.hexdigest()
        for row in range(len(rows)):
            try:
                values = rows.values(row)
                columns = columns or list(values)
                rows.prompt_column = rows.prompt_column or _usual_prompt(values)
                prompt = values.get(rows.prompt_column)
                if rows.prompt_column is not None and not (prompt and isinstance(prompt, str)):
                    raise ValueError(
                        f"must have a text in column {rows.prompt_column!r}, got {shown(prompt)}"
                    )
                if output_column in values:
                    raise ValueError(
                        f"has a column {output_column!r} already: give another `output_column`"
                    )
            except ValueError as error:
                rows.bad[row] = f"{rows.where(row)} {error}."
        if rows.prompt_column is None and columns:
            raise ValueError(
                f"`prompt_column` must be given: neither question nor prompt is among the columns "
                f"{columns} of {str(path)!r}."
            )
        return rows

    def where(self, row: int) -> str:
        """A row's place, for a message."""
        return f"Line {self.numbers[row]} of {str(self.path)!r}"

    def values(self, row: int) -> dict[str, Any]:
        """The columns of a row."""
        return parsed(self.lines[row])


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: it holds none; the message goes on after the name of the line.
    """
    try:
        values = json.loads(line.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON object: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"is no JSON object, but a {type(values).__name__}")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a column stands twice among {shown([name for name, _ in pairs])}")
    return values


def _usual_prompt(values: dict[str, Any]) -> str | None:
    return next((column for column in USUAL_PROMPTS if column in values), None)
