"""Results in a file that only grows, so that a killed run takes them up again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import make_durable


def append_results(path: Path, results: Iterable[tuple[str | int, Any]]) -> None:
    """Adds results, each with its key, and returns when they are on the disk."""
    # A line begins with its break, so that one that a kill tore ends there.
    data = "".join("\n" + json.dumps(result) for result in results).encode()
    # In one unbuffered write: a process that a kill left over may write to the same file.
    with path.open("ab", buffering=0) as file:
        if file.write(data) < len(data):
            raise OSError(f"{str(path)!r} could not be written: is the disk full?")
        os.fsync(file.fileno())
    make_durable(path.parent)


def read_results(path: Path) -> dict[str | int, Any]:
    """The results by key; torn lines are passed over."""
    found: dict[str | int, Any] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError):
            key, result = json.loads(line)
            found.setdefault(key, result)
    return found
