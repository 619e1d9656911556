"""The rows of a JSONL file, read line by line."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

USUAL_PROMPTS = ("question", "prompt")
OF_A_ROW = ("gen_length", "num_inference_steps", "seed")
"""Columns that, where a line has them, are settings of its row."""


@dataclass
class JSONLRows:
    """The rows of a JSONL file, of which only the places are kept in memory.

    Attributes:
        path: the file.
        prompt_column: the column of the prompts.
        offsets: where each row's line begins, in bytes.
        numbers: the number of each row's line, from 1.
        sha256: of the file.
    """

    path: Path
    prompt_column: str
    offsets: array
    numbers: array
    sha256: str

    def __len__(self) -> int:
        return len(self.offsets)

    @classmethod
    def read(cls, path: Path, prompt_column: str | None, output_column: str) -> JSONLRows:
        """Reads and checks all lines; see `answer_jsonl` for what is raised."""
        offsets, numbers, digest, offset = array("q"), array("q"), hashlib.sha256(), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    values = parsed(line)
                    where = f"Line {number} of {str(path)!r}"
                    if values is None:
                        raise ValueError(f"{where} is no JSON object.")
                    if prompt_column is None:
                        prompt_column = next((c for c in USUAL_PROMPTS if c in values), None)
                        if prompt_column is None:
                            raise ValueError(
                                f"`prompt_column` must be given: neither question nor prompt is "
                                f"among the columns {list(values)} of {str(path)!r}."
                            )
                    prompt = values.get(prompt_column)
                    if not isinstance(prompt, str) or not prompt:
                        raise ValueError(
                            f"{where} must have a text in column {prompt_column!r}, got {prompt!r}."
                        )
                    if output_column in values:
                        raise ValueError(
                            f"{where} has a column {output_column!r} already: give another "
                            "`output_column`."
                        )
                    for name in OF_A_ROW:
                        if type(values.get(name, 0)) is not int:
                            raise ValueError(
                                f"{where} must have an integer in column {name!r}, which is a "
                                f"setting of its row, got {values[name]!r}: rename a column that "
                                "means something else."
                            )
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        if not offsets:
            raise ValueError(f"`source` {str(path)!r} has no rows.")
        return cls(path, prompt_column, offsets, numbers, digest.hexdigest())

    def values(self, row: int) -> dict[str, Any]:
        """The columns of a row."""
        with self.path.open("rb") as file:
            return parsed(line_at(file, self.offsets[row]))


def line_at(file: BinaryIO, offset: int) -> bytes:
    """The line that begins at a byte."""
    file.seek(offset)
    return file.readline()


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None if it holds none."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
