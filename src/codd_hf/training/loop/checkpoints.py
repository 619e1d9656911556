"""Checkpoints of training runs: safetensors and JSON, replaced atomically."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ...runtime.files import explained_lack_of_room, make_durable, read_json


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


class Checkpoints:
    """The numbered checkpoints of a stage: `folder/checkpoint-100`, `folder/checkpoint-200`, ...

    Args:
        folder: receives them.
        total_limit: how many are kept, the newest ones; all if None.
    """

    def __init__(self, folder: str | Path, total_limit: int | None = None):
        self.folder = Path(folder)
        self.total_limit = total_limit

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, in order."""
        if not self.folder.exists():
            return []
        names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        keep: Iterable[int] = (),
    ) -> None:
        """Writes a checkpoint, then deletes those that are too many and what a kill left over.

        Args:
            step: how many steps were made.
            tensors: everything that is a tensor.
            state: everything else, as JSON; its `step` is `step`.
            keep: steps whose checkpoints stay, whatever the limit.

        Raises:
            OSError: there is no room; the older checkpoints are still whole.
        """
        save_checkpoint(self.path(step), tensors, {"step": step} | state)
        steps = self.steps()
        surplus = 0 if self.total_limit is None else max(len(steps) - self.total_limit, 0)
        for old in steps[:surplus]:
            if old not in keep:
                self._delete(old)
        for rest in (*self.folder.glob("*.old"), *self.folder.glob("*.new")):
            shutil.rmtree(rest)

    def load(
        self, resume_from_checkpoint: str | Path = "latest"
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What a run goes on from, or None where it begins; the main process deletes.

        Args:
            resume_from_checkpoint: `"latest"`, the newest checkpoint, if there is one; `"none"`,
                all checkpoints are deleted; or the folder of a checkpoint, here or elsewhere: the
                later ones here are deleted.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is damaged; the message names an older one that is whole.
        """
        if resume_from_checkpoint == "none":
            self._delete_after(-1)
            return None
        steps = self.steps()
        if resume_from_checkpoint == "latest":
            if not steps:
                return None
            path = self.path(steps[-1])
        else:
            path = Path(resume_from_checkpoint)
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            older = [self.path(s) for s in reversed(steps) if self.path(s) != path]
            whole = next((str(other) for other in older if _is_whole(other)), None)
            remedy = "there is no other that is whole: begin this stage again with 'none'"
            if whole is not None:
                remedy = f"go on from {whole!r}, or begin this stage again with 'none'"
            raise ValueError(
                f"The checkpoint {str(path)!r} is damaged. For `resume_from_checkpoint`, {remedy}."
            ) from error
        if found is None:
            raise FileNotFoundError(
                f"`resume_from_checkpoint`: there is no checkpoint {str(path)!r}; the steps in "
                f"{str(self.folder)!r} are {steps}."
            )
        if resume_from_checkpoint != "latest":
            self._delete_after(found[1]["step"])
        return found

    def identity(self) -> list[int] | None:
        """What tells the newest checkpoint from any other, or None where there is none."""
        steps = self.steps()
        if not steps:
            return None
        state = read_json(self.path(steps[-1]) / "state.json")
        return [steps[-1], state.get("tensors_crc32")]

    def _delete_after(self, step: int) -> None:
        if PartialState().is_main_process:
            for later in self.steps():
                if later > step:
                    self._delete(later)

    def _delete(self, step: int) -> None:
        # What a kill leaves of it must not look like a checkpoint.
        gone = self.path(step).with_name(f"checkpoint-{step}.old")
        shutil.rmtree(gone, ignore_errors=True)
        self.path(step).rename(gone)
        shutil.rmtree(gone)


def _is_whole(path: Path) -> bool:
    try:
        return load_checkpoint(path) is not None
    except ValueError:
        return False


DIGESTS = {
    "data": "training data",
    "validation_data": "validation data",
    "windows": "training data",
    "validation": "validation data",
    "evidence": "evidence",
    "tokenizer": "tokens of the tokenizer",
    "embeddings": "embeddings of the backbone",
    "model_settings": "settings of the backbone",
    "model_weights": "weights of the backbone",
}
"""What identities hold as digests, which say nothing to a reader."""


def check_same_run(
    path: Path, theirs: dict[str, Any], ours: dict[str, Any], may_change: tuple[str, ...]
) -> None:
    """Refuses to continue a run with other settings, except those that `may_change`.

    Raises:
        ValueError: a setting differs; the message names it.
    """
    for name, value in ours.items():
        if name in may_change or theirs.get(name) == value:
            continue
        if name in DIGESTS:
            made = f"with other {DIGESTS[name]} (`{name}`): give back those"
        else:
            made = f"with `{name}` {theirs.get(name)!r}, not {value!r}: continue with that"
        raise ValueError(
            f"The checkpoint {str(path)!r} was made {made}, or begin this stage anew with "
            "`resume_from_checkpoint` 'none' (`--resume-from-checkpoint none`)."
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
