"""Promises of checkpoints: all or nothing, readable without pickle, bit-equal, refused if other."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codd_hf.training import Checkpoints
from codd_hf.training.loop.checkpoints import read_checkpoint


def save(checkpoints: Checkpoints, *steps: int, **options) -> None:
    for step in steps:
        checkpoints.save(step, {"a": torch.tensor(step)}, {"history": []}, **options)


def damage(checkpoint: Path) -> None:
    file = checkpoint / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_checkpoint_of_safetensors_and_json_comes_back_as_it_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "fit")
    assert checkpoints.load() is None
    tensors = {"a": torch.randn(3, 2).T, "b": torch.arange(3)}
    checkpoints.save(3, tensors, {"history": [{"gain": 0.25}]})
    found, state = checkpoints.load()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    assert state == {"step": 3, "history": [{"gain": 0.25}]}
    folder = checkpoints.path(3)
    assert {p.name for p in folder.iterdir()} == {"state.safetensors", "state.json"}
    assert torch.equal(load_file(folder / "state.safetensors")["b"], tensors["b"])
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint-3"]


def test_crash_while_writing_leaves_the_old_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(TypeError):
        checkpoints.save(2, {"a": torch.tensor(2)}, {"history": object()})
    assert checkpoints.load()[1]["step"] == 1
    for name in ("checkpoint.new", "checkpoint.old"):  # what a kill leaves
        (tmp_path / name).mkdir(exist_ok=True)
    assert checkpoints.steps() == [1]
    save(checkpoints, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("change", ["cut", "bit", "gone"])
def test_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, name, change):
    save(Checkpoints(tmp_path), 1)
    file = tmp_path / "checkpoint-1" / name
    held = bytearray(file.read_bytes())
    held[-3] ^= 2 if name == "state.safetensors" else 0x80
    file.unlink()
    if change != "gone":
        file.write_bytes(held if change == "bit" else held[: len(held) // 2])
    with pytest.raises(ValueError, match=r"checkpoint-1' is damaged.*begin this stage again"):
        Checkpoints(tmp_path).load()


def test_lack_of_room_keeps_the_old_checkpoint_and_says_what_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .* Make room and start again"):
            checkpoints.save(2, {"a": torch.zeros(9000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_newest_checkpoints_are_kept_and_those_that_shall_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "fit", total_limit=2)
    save(checkpoints, 9, 10, 100)
    assert checkpoints.steps() == [10, 100]
    save(checkpoints, 101, 102, keep=[10])
    assert checkpoints.steps() == [10, 101, 102]
    save(Checkpoints(tmp_path / "all"), *range(1, 6))
    assert Checkpoints(tmp_path / "all").steps() == [1, 2, 3, 4, 5]


def test_damaged_newest_checkpoint_is_an_error_that_names_the_newest_whole_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, 20, 30, 40)
    damage(checkpoints.path(40))
    damage(checkpoints.path(30))
    with pytest.raises(ValueError, match=r"checkpoint-40' is damaged.*go on from '.*-20', or"):
        checkpoints.load()
    assert checkpoints.steps() == [10, 20, 30, 40]
    tensors, state = Checkpoints(tmp_path, checkpoints.path(20)).load()
    assert (tensors["a"].item(), state["step"]) == (20, 20)
    assert checkpoints.steps() == [10, 20]


def test_checkpoint_of_another_folder_leaves_it_as_it_is(tmp_path):
    theirs = Checkpoints(tmp_path / "theirs")
    save(theirs, 5, 6)
    assert Checkpoints(tmp_path / "ours", theirs.path(5)).load()[1]["step"] == 5
    assert theirs.steps() == [5, 6]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*-7'; the steps in .* are \[\]"):
        Checkpoints(tmp_path / "ours", theirs.path(7)).load()


def test_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 1)
    path = tmp_path / "checkpoint-1" / "state.json"
    state = json.loads(path.read_text())
    del state["format_version"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="of an earlier version, which cannot be continued: begin"):
        read_checkpoint(path.parent)
