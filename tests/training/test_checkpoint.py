"""Promises of checkpoints: all or nothing, readable without pickle, bit-equal, refused if other."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from codd_hf.training import Checkpoints

IDENTITY = {"seed": 0, "data": "abc"}


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        state = {"history": [], "identity": IDENTITY}
        checkpoints.save(step, {"a": torch.tensor(step)}, state)


def test_checkpoint_of_safetensors_and_json_comes_back_as_it_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "fit")
    assert checkpoints.load(IDENTITY) is None
    tensors = {"a": torch.randn(3, 2).T, "b": torch.arange(3)}
    checkpoints.save(3, tensors, {"history": [{"gain": 0.25}], "identity": IDENTITY})
    found, state = checkpoints.load(IDENTITY)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    assert state == {"step": 3, "history": [{"gain": 0.25}], "identity": IDENTITY}
    folder = checkpoints.path(3)
    assert {p.name for p in folder.iterdir()} == {"state.safetensors", "state.json"}
    assert torch.equal(load_file(folder / "state.safetensors")["b"], tensors["b"])
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint-3"]


def test_crash_while_writing_or_deleting_leaves_the_old_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 2)
    with pytest.raises(TypeError):
        checkpoints.save(3, {"a": torch.tensor(2)}, {"history": object()})
    (checkpoints.path(1) / "state.json").unlink()  # the first act of deleting
    assert checkpoints.steps() == [2]
    assert checkpoints.load(IDENTITY)[1]["step"] == 2
    save(checkpoints, 1, 3)
    assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, name, change):
    save(Checkpoints(tmp_path), 1, 2)
    file = tmp_path / "checkpoint-2" / name
    held = file.read_bytes()
    file.unlink()
    if change == "gone" and name == "state.json":
        assert Checkpoints(tmp_path).load(IDENTITY)[1]["step"] == 1
        return
    if change != "gone":
        file.write_bytes(held[: len(held) // 2])
    with pytest.raises(ValueError, match=r"checkpoint-2' cannot be continued .* delete it, and"):
        Checkpoints(tmp_path).load(IDENTITY)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert Checkpoints(tmp_path).load(IDENTITY)[1]["step"] == 1


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
    assert checkpoints.steps() == [1]


def test_newest_two_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "fit")
    save(checkpoints, 9, 10, 100)
    assert checkpoints.steps() == [10, 100]


def test_checkpoint_of_another_fit_or_version_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 1)
    with pytest.raises(ValueError, match=r"another `seed` \(0, not 1\): continue with that, or"):
        Checkpoints(tmp_path).load(IDENTITY | {"seed": 1})
    path = tmp_path / "checkpoint-1" / "state.json"
    state = json.loads(path.read_text())
    del state["format_version"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"another `format_version` \(1, not 2\)"):
        Checkpoints(tmp_path).load(IDENTITY)
