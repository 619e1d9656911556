"""Rows with prompts, with their line numbers, and why some cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks.arguments import shown
from ..data.rows import BadRowError, Row, read_rows

USUAL_PROMPTS = ("question", "prompt")


@dataclass
class PromptRows:
    """The rows of a JSONL file.

    Attributes:
        path: the file.
        prompt_column: the column of the prompts.
        rows: the number of each row's line, from 1, and its columns.
        bad: why a row cannot be used, by its place.
    """

    path: Path
    prompt_column: str | None
    rows: list[Row]
    bad: dict[int, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls, path: Path, prompt_column: str | None = None, output_column: str | None = None
    ) -> PromptRows:
        """Reads a file and checks its rows.

        Args:
            path: the file.
            prompt_column: default `question` or else `prompt`.
            output_column: a column that no row may have.

        Raises:
            ValueError: there is no row, or nothing says which column has the prompts.
            OSError: the file cannot be read.
        """
        rows = read_rows(str(path))
        if not rows:
            raise ValueError(f"`source` {str(path)!r} has no rows.")
        good = [row for _, row in rows if isinstance(row, dict)]
        usual = (column for row in good for column in USUAL_PROMPTS if column in row)
        found = cls(path, prompt_column or next(usual, None), rows)
        if found.prompt_column is None and good:
            raise ValueError(
                f"`prompt_column` must be given: neither question nor prompt is among the columns "
                f"{list(good[0])} of {str(path)!r}."
            )
        for i, (_, row) in enumerate(rows):
            fault = row if isinstance(row, BadRowError) else found._fault(row, output_column)
            if fault is not None:
                found.bad[i] = f"{found.where(i)} {fault}."
        return found

    def _fault(self, row: dict[str, Any], output_column: str | None) -> str | None:
        prompt = row.get(self.prompt_column)
        if not isinstance(prompt, str) or not prompt:
            return f"must have a text in column {self.prompt_column!r}, got {shown(prompt)}"
        if output_column in row:
            return f"has a column {output_column!r} already: give another `output_column`"
        return None

    def where(self, i: int) -> str:
        """A row's place, for a message."""
        return f"Line {self.rows[i][0]} of {str(self.path)!r}"
