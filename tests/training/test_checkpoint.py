"""Promises of checkpoints: all or nothing, readable without pickle, bit-equal."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors.torch import load_file

from codd_hf.training.loop.checkpoints import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizers,
    save_checkpoint,
)


def test_checkpoint_comes_back_as_it_was_written(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.arange(3)}
    state = {"step": 3, "history": [{"gain": 0.25}]}
    save_checkpoint(tmp_path / "run", tensors, state)
    found, found_state = load_checkpoint(tmp_path / "run")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    assert found_state == state


def test_there_is_no_checkpoint_in_a_folder_that_has_none(tmp_path):
    assert load_checkpoint(tmp_path / "run") is None


def test_checkpoint_is_safetensors_and_json_alone(tmp_path):
    save_checkpoint(tmp_path / "run", {"a": torch.ones(1)}, {"step": 1})
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"state.safetensors", "state.json"}
    assert load_file(tmp_path / "run" / "state.safetensors")["a"].item() == 1
    assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 1


def test_new_checkpoint_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", {"a": torch.tensor(step)}, {"step": step})
    tensors, state = load_checkpoint(tmp_path / "run")
    assert (tensors["a"].item(), state["step"]) == (2, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_crash_while_writing_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "run", {"a": torch.tensor(1)}, {"step": 1})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "run", {"a": torch.tensor(2)}, {"step": object()})
    tensors, state = load_checkpoint(tmp_path / "run")
    assert (tensors["a"].item(), state["step"]) == (1, 1)
    save_checkpoint(tmp_path / "run", {"a": torch.tensor(3)}, {"step": 3})
    assert load_checkpoint(tmp_path / "run")[1] == {"step": 3}


def test_crash_between_the_two_renames_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "run", {"a": torch.tensor(1)}, {"step": 1})
    (tmp_path / "run").rename(tmp_path / "run.old")
    assert load_checkpoint(tmp_path / "run")[1] == {"step": 1}


def test_optimisers_go_on_bit_equal_after_their_states_were_restored():
    def start():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))]
        optimizers = [torch.optim.Muon(parameters[:1]), torch.optim.AdamW(parameters[1:])]
        return parameters, optimizers

    def advance(parameters, optimizers, steps):
        for step in steps:
            for parameter, optimizer in zip(parameters, optimizers, strict=True):
                parameter.grad = (parameter.detach() + step).sin()
                optimizer.step()

    parameters, optimizers = start()
    advance(parameters, optimizers, range(6))
    stopped, first = start()
    advance(stopped, first, range(3))
    resumed, second = start()
    for parameter, value in zip(resumed, stopped, strict=True):
        parameter.data.copy_(value.data)
    restore_optimizers(second, {k: v.clone() for k, v in optimizer_tensors(first).items()})
    advance(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, name, damage):
    save_checkpoint(tmp_path / "run", {"a": torch.arange(9)}, {"step": 1})
    file = tmp_path / "run" / name
    held = bytearray(file.read_bytes())
    held[-3] ^= 2 if name == "state.safetensors" else 0x80
    damaged = {"cut": bytes(held[: len(held) // 2]), "bit": bytes(held)}
    file.unlink()
    if damage != "gone":
        file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"run' is damaged: delete it to begin this stage again"):
        load_checkpoint(tmp_path / "run")


def test_lack_of_room_keeps_the_old_checkpoint_and_says_what_to_do(tmp_path):
    save_checkpoint(tmp_path / "run", {"a": torch.zeros(9)}, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .* Make room and start again"):
            save_checkpoint(tmp_path / "run", {"a": torch.zeros(9000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path / "run")[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
