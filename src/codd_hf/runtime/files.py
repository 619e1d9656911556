"""Files that are whole or not there: written beside their place, made durable, then renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` when the block ends well."""
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
