"""One run at a time: a lock that dies with the process that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


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
