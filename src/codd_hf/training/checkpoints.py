"""Checkpoints: folders of safetensors and JSON, whole or not there, of one fit alone."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..runtime.files import atomic_write, make_durable, read_json

FORMAT_VERSION = 2
KEPT = 2
"""An older one serves where the newest is damaged."""
WEIGHTS, STATE = "state.safetensors", "state.json"


@dataclass
class Checkpoints:
    """The newest checkpoints of a fit, by their steps: `folder/checkpoint-100`, ..."""

    folder: Path

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, in order."""
        names = (path.parent.name for path in self.folder.glob(f"checkpoint-*/{STATE}"))
        return sorted(int(name.removeprefix("checkpoint-")) for name in names)

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Writes a checkpoint, then deletes those that are too many.

        A kill or a full disk leaves a folder without `state.json`, which is no checkpoint.
        """
        self._delete(step)
        self.path(step).mkdir(parents=True)
        make_durable(self.folder)
        with atomic_write(self.path(step) / WEIGHTS) as new:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new)
        with atomic_write(self.path(step) / STATE) as new:
            facts = {"step": step, "format_version": FORMAT_VERSION}
            new.write_text(json.dumps(state | facts, indent=2))
        for old in self.steps()[:-KEPT]:
            self._delete(old)

    def load(
        self, identity: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and the state that a fit of this identity goes on from; None: it begins."""
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            state = read_json(path / STATE)
            tensors = load_file(path / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"The checkpoint {str(path)!r} cannot be continued ({error}): delete it, and the "
                "fit goes on from the one before."
            ) from error
        theirs = state["identity"] | {"format_version": state.pop("format_version", 1)}
        for name, value in (identity | {"format_version": FORMAT_VERSION}).items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"The checkpoint {str(path)!r} was made with another `{name}` "
                    f"({theirs.get(name)!r}, not {value!r}): continue with that, or begin this "
                    "stage anew with `--resume-from-checkpoint none`."
                )
        return tensors, state

    def _delete(self, step: int) -> None:
        (self.path(step) / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.path(step), ignore_errors=True)
