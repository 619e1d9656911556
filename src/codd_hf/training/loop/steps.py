"""The loop of every fit: measured now and then, and bit-equal when it goes on after a stop."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..identity import check_same
from ..stage_settings import FitConfig
from .checkpoints import Checkpoints
from .trackers import Log

Figures = dict[str, float]
History = list[Figures]
"""An entry has the `step` after which it was measured, the figures of the validation, the `tokens`
and the `seconds` since the first step, and the mean `loss` since the last entry."""

ANEW = (
    "begin this stage anew with `resume_from_checkpoint` 'none' (`--resume-from-checkpoint none`)"
)


class Fit(ABC):
    """A fit by steps, each a function of its number and of the fit's state alone.

    Attributes:
        name: beside the progress bar.
        config: its settings.
        identity: tells this run from any other, as JSON.
        num_steps: how many steps there are.
        evaluation_steps: steps between validations.
        measure: gives the figures of a validation.
        kept: of a history, the steps whose checkpoints are written and stay in any case.
    """

    name: str
    config: FitConfig
    identity: dict[str, Any]
    num_steps: int
    evaluation_steps: int
    measure: Callable[[], Figures]
    kept: Callable[[History], list[int]] = staticmethod(lambda history: [])

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All that a step depends on beside its number."""

    @abstractmethod
    def restore(self, tensors: dict[str, torch.Tensor] | None) -> None:
        """Sets the state; None: that before the first step."""

    @abstractmethod
    def step(self, number: int) -> tuple[Figures, int]:
        """Makes the step of a number, from 0; returns its figures and its tokens."""

    @abstractmethod
    def remedy(self, step: int | None) -> str:
        """Where a figure that is not finite came from in a step, and what to change."""

    def check_finite(self, figures: Figures, step: int | None = None) -> None:
        """Refuses to go on with a step, or a validation, that has come to nothing.

        Raises:
            FloatingPointError: a figure is not finite.
        """
        place = "the validation" if step is None else f"step {step}"
        for name, value in figures.items():
            if not math.isfinite(value):
                cause = self.remedy(step)
                raise FloatingPointError(
                    f"The {name} is {value} at {place} of the {self.name}{cause}."
                )


def run_steps(
    fit: Fit, checkpoints: Checkpoints | None, log: Log | None, alone: bool = False
) -> History:
    """Makes the steps that are left of a fit, and returns its history.

    Args:
        fit: the fit.
        checkpoints: where the main process writes them, and where the fit goes on from; nowhere if
            None.
        log: told of every step.
        alone: this process makes the steps alone, and waits for no others.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FloatingPointError: a figure is no longer finite.
        OSError: the disk has no room for a checkpoint.
        ValueError: the checkpoint is another run's, or damaged.
    """
    accelerator = Accelerator()
    show = tqdm.write if accelerator.is_main_process else lambda _: None
    identity = fit.identity
    if checkpoints is not None and checkpoints.start is not None:
        identity = identity | {"start": checkpoints.start}
    state: dict[str, Any] = {"step": 0, "history": [], "loss": 0.0, "tokens": 0, "seconds": 0.0}
    found = None if checkpoints is None else checkpoints.load()
    tensors, state = (None, state) if found is None else found
    if tensors is not None:
        folder = str(checkpoints.folder)
        check_same(f"The checkpoints in {folder!r} were", state["identity"], identity, ANEW)
        going_on = f"goes on from step {state['step']} of {fit.num_steps}"
        show(f"The {fit.name} {going_on if state['step'] < fit.num_steps else 'is complete'}.")
    fit.restore(tensors)
    history, began = state["history"], time.monotonic() - state["seconds"]

    def measure() -> Figures:
        measured = fit.measure()
        fit.check_finite(measured)
        entry = {"step": state["step"], **measured}
        if history:
            read, seconds = state["tokens"], time.monotonic() - began
            loss = state["loss"] / (read - history[-1].get("tokens", 0))
            entry |= {"loss": loss, "tokens": read, "seconds": seconds}
            state["loss"] = 0.0
        history.append(entry)
        show(str(entry))
        return measured

    def save() -> None:
        if checkpoints is not None and accelerator.is_main_process:
            facts = state | {"seconds": time.monotonic() - began, "identity": identity}
            checkpoints.save(state["step"], fit.state(), facts, fit.kept(history))
        if checkpoints is not None and not alone:
            accelerator.wait_for_everyone()

    if not history:
        measure()
        if fit.kept(history):
            save()
    bar = {"total": fit.num_steps, "initial": state["step"], "desc": fit.name, "unit": "step"}
    with tqdm(**bar, disable=not accelerator.is_local_main_process) as progress:
        while state["step"] < fit.num_steps:
            step_began = time.monotonic()
            figures, read = fit.step(state["step"])
            state["step"] += 1
            state["tokens"] += read
            state["loss"] += figures["loss"] * read
            progress.update()
            progress.set_postfix({k: f"{v:.3f}" for k, v in figures.items() if k in SHOWN})
            figures["tokens_per_second"] = read / max(time.monotonic() - step_began, 1e-9)
            figures["memory_gb"] = _memory(accelerator.device)
            step, last = state["step"], state["step"] == fit.num_steps
            if last or step % fit.evaluation_steps == 0:
                figures |= {f"validation_{name}": value for name, value in measure().items()}
            if log is not None:
                log(step, figures)
            if last or step % fit.config.checkpointing_steps == 0 or step in fit.kept(history):
                save()
    return history


SHOWN = ("loss", "gain", "nats")


def _memory(device: torch.device) -> float:
    """GB that this process uses: the peak on a GPU, what is resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
