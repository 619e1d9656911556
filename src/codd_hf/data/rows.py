"""The rows of a JSONL or text file, as they are written, and the report on bad ones.

Nothing guesses the type of a column: a date in quotes is a text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import shown

SAMPLE_BY = ("line", "paragraph")
LISTED = 20
"""So many reasons, and so many rows of each, are told."""

Row = tuple[int, "dict[str, Any] | BadRowError"]
"""A row's number, from 1, and its columns, or what is wrong where they should be."""


class BadRowError(ValueError):
    """What is wrong with one row, as the end of a sentence that begins with its number."""


@dataclass
class RowReport:
    """The rows of `source` that give no example: `left_out` has their numbers by the reason."""

    source: str
    skip_bad_rows: bool = False
    unit: str = "Row"
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def refuse(self, number: int, reason: str) -> None:
        """Notes a bad row, or raises a ValueError if such rows are not to be skipped."""
        if not self.skip_bad_rows:
            raise ValueError(
                f"{self.unit} {number} of {self.source} {reason}: mend it, or leave bad ones out "
                "with `skip_bad_rows`."
            )
        self.pass_over(number, reason)

    def pass_over(self, number: int, reason: str) -> None:
        """Notes a row that gives no example."""
        self.left_out.setdefault(reason, []).append(number)

    def __str__(self) -> str:
        numbers = sum(map(len, self.left_out.values()))
        lines = [f"Of {self.source}, {numbers} rows are left out."] if numbers else []
        for reason, rows in islice(self.left_out.items(), LISTED):
            more = ", ..." if len(rows) > LISTED else ""
            lines.append(f"Rows left out: {', '.join(map(str, rows[:LISTED]))}{more}: {reason}.")
        return "\n".join(lines)


def tell(text: object) -> None:
    """Prints a text, unless it is empty, on the main process."""
    if str(text) and PartialState().is_main_process:
        tqdm.write(str(text))


def read_rows(path: str, sample_by: str = "line") -> list[Row]:
    """All rows of a file in UTF-8, in order, numbered by lines where a row is a line.

    A .txt file has texts, in one column `text`: lines or, up to an empty line, paragraphs. Others
    have JSON objects, one a line. Blank lines are no rows.
    """
    if Path(path).suffix == ".txt":
        # Bytes that are no UTF-8 become halves of surrogate pairs, which only their rows are about.
        text = Path(path).read_text("utf-8-sig", "surrogateescape")
        parts = re.split(r"\n\n+" if sample_by == "paragraph" else r"\n", text)
        texts = enumerate((part.strip("\n") for part in parts), 1)
        return [(number, {"text": text}) for number, text in texts if text.strip()]
    lines = enumerate(Path(path).read_bytes().splitlines(), 1)
    return [(number, _columns(line)) for number, line in lines if line.strip()]


def _columns(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"is not JSON ({error})")
    if not isinstance(value, dict):
        return BadRowError(f"is not a JSON object ({shown(value)})")
    return value
