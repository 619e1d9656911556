"""The loop of a fit by optimiser steps: measured now and then, and bit-equal when it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..joint_settings import JointConfig
from ..settings import ConditionalConfig, PretrainingConfig
from .checkpoints import Checkpoints, check_same_run, optimizer_tensors, restore_optimizers
from .trackers import Log, Speedometer

logger = logging.getLogger(__name__)

History = list[dict[str, float]]
"""What was measured: an entry has the `step` after which it was, figures, and `seconds`."""

Backward = Callable[[int], tuple[dict[str, float], int, dict[str, str]]]
"""Sets the gradients of a step, of which it is given the number, from 0. Returns the step's figures
for the log (`loss` is one), its tokens over all processes, and what the progress bar shows."""


@dataclass
class StepLoop:
    """Optimiser steps, between any two of which a fit may stop and go on as if it had not.

    There is an entry of the history every `evaluation_steps` and at the end, and a checkpoint,
    which the main process writes, every `checkpointing_steps` and at the end.

    Args:
        name: of the fit, beside its progress bar.
        config: how many steps there are, and how often to measure and to keep.
        made_of: what tells this run from any other, as JSON; checkpoints hold it.
        trained: what is trained, under its names in checkpoints.
        optimizers: which train it.
        checkpoints: where they are kept; nowhere if None.
        log: told of every step.
        tally: what of the steps the history tells. `"losses"`: their mean since the last entry, as
            `loss`; so there is an entry before the first step, too. `"tokens"`: how many were read
            since the first step.
        kept: of a history, the steps whose checkpoints are written and stay in any case.
        alone: this process makes the steps alone, and must not wait for others.

    Attributes:
        step: how many steps were made.
        history: its entries so far.
    """

    name: str
    config: PretrainingConfig | ConditionalConfig | JointConfig
    made_of: dict[str, Any]
    trained: dict[str, torch.nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    checkpoints: Checkpoints | None
    log: Log | None
    tally: Literal["losses", "tokens"] = "losses"
    kept: Callable[[History], list[int]] = lambda history: []
    alone: bool = False
    step: int = field(default=0, init=False)
    history: History = field(default_factory=list, init=False)

    def __post_init__(self):
        self._accelerator = Accelerator()
        self._total, self._seconds = 0, 0.0

    def show(self, message: str) -> None:
        """Prints a line on the main process."""
        (tqdm.write if self._accelerator.is_main_process else logger.debug)(message)

    def resume(self, resume_from_checkpoint: str | Path, may_change: tuple[str, ...]) -> bool:
        """Takes what a checkpoint holds, and says whether there is one.

        Args:
            resume_from_checkpoint: as in `Checkpoints.load`.
            may_change: what of `made_of` may differ from the checkpoint's.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is another run's, or damaged.
        """
        found = None if self.checkpoints is None else self.checkpoints.load(resume_from_checkpoint)
        if found is None:
            return False
        tensors, state = found
        check_same_run(self.checkpoints.folder, state["config"], self.made_of, may_change)
        self.restore(tensors)
        restore_optimizers(self.optimizers, tensors)
        self.step, self.history = state["step"], state["history"]
        self._total, self._seconds = state[self.tally], state["seconds"]
        return True

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Sets what is trained to the tensors of a checkpoint."""
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])

    def run(self, backward: Backward, measure: Callable[[], dict[str, float]]) -> History:
        """Makes the steps that are left, and returns the history.

        Args:
            backward: sets the gradients of a step.
            measure: gives the figures of an entry; the log has them as `validation_NAME`.

        Raises:
            OSError: the disk has no room for a checkpoint.
        """
        config, accelerator = self.config, self._accelerator
        self._began = time.monotonic() - self._seconds
        if self.tally == "losses" and not self.history:
            self._record(measure())
            if self.step in self.kept(self.history):
                self._save()
        progress = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        speed = Speedometer(accelerator.device)
        while self.step < config.max_steps:
            speed.start()
            told, tokens, shown = backward(self.step)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            self._total += told["loss"] if self.tally == "losses" else tokens
            told |= speed.read(tokens)
            progress.update()
            progress.set_postfix(**shown)
            last = self.step == config.max_steps
            if last or self.step % config.evaluation_steps == 0:
                measured = measure()
                self._record(measured)
                told |= {f"validation_{name}": value for name, value in measured.items()}
            if self.log is not None:
                self.log(self.step, told)
            due = last or self.step % config.checkpointing_steps == 0
            if due or self.step in self.kept(self.history):
                self._save()
        progress.close()
        return self.history

    def _record(self, measured: dict[str, float]) -> None:
        entry = {"step": self.step, **measured}
        if self.step > 0:
            if self.tally == "tokens":
                entry["tokens"] = self._total
            else:
                entry["loss"] = self._total / (self.step - self.history[-1]["step"])
                self._total = 0.0
            entry["seconds"] = time.monotonic() - self._began
        self.history.append(entry)
        self.show(str(entry))

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        if self._accelerator.is_main_process:
            state = {"step": self.step, "history": self.history, self.tally: self._total}
            state |= {"seconds": time.monotonic() - self._began, "config": self.made_of}
            tensors = self.trained | optimizer_tensors(self.optimizers)
            self.checkpoints.save(self.step, tensors, state, self.kept(self.history))
        if not self.alone:
            self._accelerator.wait_for_everyone()
