"""A run has what it writes to itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from codd_hf.runtime.files import locked

HOLD = """
import sys, time
from pathlib import Path
from codd_hf.runtime.files import locked
with locked(Path(sys.argv[1]), "`x`"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock `tmp_path / ".lock"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_at_once_and_a_killed_one_leaves_nothing_locked(tmp_path, holder):
    with (
        pytest.raises(OSError, match=r"`output_dir` 'runs/mine' is being written by another run"),
        locked(tmp_path / ".lock", "`output_dir` 'runs/mine'"),
    ):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / ".lock", "`output_dir`"):
        pass


def test_a_lock_holds_against_the_same_process_too_and_ends_with_its_block(tmp_path):
    path = tmp_path / ".lock"
    with (
        locked(path, "`a`"),
        pytest.raises(OSError, match="`b` is being written by another run"),
        locked(path, "`b`"),
    ):
        pass
    with pytest.raises(KeyError), locked(path, "`a`"):
        raise KeyError
    with locked(path, "`b`"):
        pass


def test_a_place_where_no_lock_can_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match="`x` cannot be written"),
        locked(tmp_path / "file" / ".lock", "`x`"),
    ):
        pass
