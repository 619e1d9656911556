"""Checkpoints of training runs: safetensors and JSON, replaced atomically."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .files import explained_lack_of_room, make_durable


def save_checkpoint(path: str | Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]):
    """Writes a checkpoint folder; a crash leaves the old one or the new one, never a half.

    Args:
        path: the folder; an existing checkpoint there is replaced.
        tensors: everything that is a tensor.
        state: everything else, as JSON.

    Raises:
        OSError: there is no room; the old checkpoint is still whole.
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with explained_lack_of_room(path):
        try:
            file = new / "state.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
            text = json.dumps(state | {"tensors_crc32": _checksum(file)}, indent=2)
            (new / "state.json").write_text(text)
            for written in (*new.iterdir(), new):
                make_durable(written)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # what a full disk could not take is in the way
            raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    make_durable(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Reads what `save_checkpoint` wrote, or None where there is no checkpoint.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    path = Path(path)
    if not path.exists():
        path = path.with_name(path.name + ".old")
    if not path.exists():
        return None
    file = path / "state.safetensors"
    try:
        state = json.loads((path / "state.json").read_text())
        whole = state.pop("tensors_crc32") == _checksum(file)
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise ValueError(
            f"The checkpoint {str(path)!r} is damaged: delete it to begin this stage again."
        )
    return load_file(file), state


def check_same_run(
    path: Path, theirs: dict[str, Any], ours: dict[str, Any], may_change: tuple[str, ...]
) -> None:
    """Refuses to continue a run with other settings, except those that `may_change`.

    Raises:
        ValueError: a setting differs; the message names it.
    """
    for name, value in ours.items():
        if name not in may_change and theirs.get(name) != value:
            raise ValueError(
                f"The checkpoint {str(path)!r} was made with `{name}` {theirs.get(name)!r}, not "
                f"{value!r}: continue with that, or delete the checkpoint to begin again."
            )


def _checksum(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The tensors of the optimisers' states, under flat names."""
    return {
        f"optimizer.{number}.{index}.{name}": value
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]
) -> None:
    """Puts `optimizer_tensors` back."""
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, torch.Tensor]] = {}
        prefix = f"optimizer.{number}."
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, name = key.removeprefix(prefix).split(".", 1)
                states.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
