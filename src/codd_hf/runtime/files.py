"""Files that survive a kill: whole or not there, or journals of results that only grow."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its place when the block ends well."""
    new = path.with_name(path.name + ".new")
    try:
        yield new
        make_durable(new)
    except BaseException as error:
        new.unlink(missing_ok=True)  # what a full disk could not take is in the way
        if any(text in str(error) for text in NO_ROOM):  # as safetensors and Arrow keep it
            raise OSError(
                f"{path} could not be written: {error}. Make room and start again: the run goes on "
                "from what is complete."
            ) from error
        raise
    new.replace(path)
    make_durable(path.parent)


def read_json(path: Path, kind: type = dict) -> Any:
    """A `kind` that a run wrote as JSON; raises a ValueError if it is damaged."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): delete it.") from error
    return value


def make_durable(path: Path) -> None:
    """Returns when a file, or the list of a folder, is on the disk (on Windows, files alone)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
