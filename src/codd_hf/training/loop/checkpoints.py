"""Where a checkpoint is written: a folder of safetensors and JSON, whole or not there."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ...runtime.files import explained_lack_of_room, make_durable, read_json

FORMAT_VERSION = 2
WEIGHTS, STATE = "state.safetensors", "state.json"


@dataclass
class Checkpoints:
    """The numbered checkpoints of a fit: `folder/checkpoint-100`, `folder/checkpoint-200`, ...

    Attributes:
        folder: receives them.
        resume: `"latest"` goes on from the newest checkpoint, if there is one; `"none"` deletes all
            and begins; the folder of a checkpoint, here or elsewhere, goes on from that and deletes
            later ones here.
        total_limit: how many are kept, the newest ones; all if None.
        start: a digest of the result that the fit begins with.
    """

    folder: Path
    resume: str | Path = "latest"
    total_limit: int | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, in order."""
        names = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in self.folder.glob("*"))
        return sorted(int(name[1]) for name in names if name)

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        keep: Iterable[int] = (),
    ) -> None:
        """Writes a checkpoint of tensors and JSON, then deletes those that are too many.

        Those of the steps in `keep` stay, whatever the limit.

        Raises:
            OSError: there is no room; the older checkpoints are still whole.
        """
        path, new = self.path(step), self.folder / "checkpoint.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with explained_lack_of_room(path):
            try:
                held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                save_file(held, new / WEIGHTS)
                facts = {"format_version": FORMAT_VERSION, "crc32": _checksum(new / WEIGHTS)}
                (new / STATE).write_text(json.dumps({"step": step} | state | facts, indent=2))
                for written in (*new.iterdir(), new):
                    make_durable(written)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)  # a full disk could not take it
                raise
        if path.exists():
            self._delete(step)
        new.rename(path)
        make_durable(self.folder)
        surplus = [] if self.total_limit is None else self.steps()[: -self.total_limit]
        for old in set(surplus) - set(keep):
            self._delete(old)
        shutil.rmtree(self.folder / "checkpoint.old", ignore_errors=True)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and the state that a fit goes on from; None where it begins.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is damaged or of an earlier version.
        """
        steps = self.steps()
        if self.resume == "none":
            self._delete_after(-1)
            return None
        if self.resume == "latest" and not steps:
            return None
        path = self.path(steps[-1]) if self.resume == "latest" else Path(self.resume)
        if not path.exists():
            raise FileNotFoundError(
                f"`resume_from_checkpoint`: there is no checkpoint {str(path)!r}; the steps in "
                f"{str(self.folder)!r} are {steps}."
            )
        found = read_checkpoint(path)
        if found is None:
            older = [self.path(s) for s in reversed(steps) if self.path(s) != path]
            whole = next((str(p) for p in older if read_checkpoint(p) is not None), None)
            remedy = "" if whole is None else f"go on from {whole!r}, or "
            raise ValueError(
                f"The checkpoint {str(path)!r} is damaged. For `resume_from_checkpoint`, {remedy}"
                "begin this stage again with 'none'."
            )
        if self.resume != "latest":
            self._delete_after(found[1]["step"])
        return found

    def _delete_after(self, step: int) -> None:
        if PartialState().is_main_process:
            for later in self.steps():
                if later > step:
                    self._delete(later)

    def _delete(self, step: int) -> None:
        gone = self.folder / "checkpoint.old"  # a kill leaves nothing that looks like a checkpoint
        shutil.rmtree(gone, ignore_errors=True)
        self.path(step).rename(gone)
        shutil.rmtree(gone)


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The tensors and the state in a checkpoint's folder; None if it is damaged.

    Raises:
        ValueError: an earlier version wrote it.
    """
    try:
        state = read_json(path / STATE)
        whole = state.pop("crc32", None) == _checksum(path / WEIGHTS)
    except (OSError, ValueError):
        return None
    if state.pop("format_version", 1) != FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint {str(path)!r} is of an earlier version, which cannot be continued: "
            "begin this stage again with `resume_from_checkpoint` 'none'."
        )
    return (load_file(path / WEIGHTS), state) if whole else None


def _checksum(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
