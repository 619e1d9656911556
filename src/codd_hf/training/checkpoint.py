"""Checkpoints of training runs: safetensors and JSON, replaced atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_checkpoint(path: str | Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]):
    """Writes a checkpoint folder; a crash leaves the old one or the new one, never a half.

    Args:
        path: the folder; an existing checkpoint there is replaced.
        tensors: everything that is a tensor.
        state: everything else, as JSON.
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new / "state.safetensors"
    )
    (new / "state.json").write_text(json.dumps(state, indent=2))
    for file in new.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Reads what `save_checkpoint` wrote, or None where there is no checkpoint."""
    path = Path(path)
    if not path.exists():
        path = path.with_name(path.name + ".old")
    if not path.exists():
        return None
    return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())


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
