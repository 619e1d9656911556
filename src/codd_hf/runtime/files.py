"""Files of runs, which may be killed: whole or not there, journals that only grow, and locks."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

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


@contextmanager
def locked(path: Path, what: str, state: PartialState | None = None) -> Iterator[None]:
    """Holds a lock file while the block runs, or refuses at once with an OSError; the file stays.

    Args:
        path: the lock file; its folder is there.
        what: begins the refusal, such as "`output_dir` 'runs/mine'".
        state: accelerate's, when several processes are one run: all of them come here, the main one
            holds the lock, and a refusal is raised in all.
    """
    lock, refusal = FileLock(path, timeout=0), [""]
    try:
        if state is None or state.is_main_process:
            lock.acquire()
    except Timeout:
        refusal = [f"{what} is being written by another run: wait for its end, or stop it."]
    except OSError as error:
        refusal = [f"{what} cannot be written: {error}."]
    if state is not None and state.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0]:
        raise OSError(refusal[0])
    try:
        yield
    finally:
        lock.release()
