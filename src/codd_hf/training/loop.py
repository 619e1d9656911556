"""The loop of every fit: measured now and then, and bit-equal when it goes on after a stop."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..runtime.precision import chosen_precision, precision_note
from .checkpoints import Checkpoints
from .settings import FitConfig, GradientConfig

Figures = dict[str, float]
History = list[Figures]
"""An entry has the `step` after which it was measured, the figures of the validation, the `tokens`
and the `seconds` since the first step, and the mean `loss` since the last entry."""
Log = Callable[[int, Figures], None]
"""Told of every step of a fit: its number, from 1, and its figures."""


class Fit(ABC):
    """A fit by steps, each a function of its number and of the fit's state alone.

    Attributes:
        name: beside the progress bar.
        config: its settings.
        identity: all that the fit depends on, as JSON.
        num_steps: how many steps there are.
        evaluation_steps: steps between validations.
        remedy: the cure for a figure that is not finite.
    """

    name: str
    config: FitConfig
    identity: dict[str, Any]
    num_steps: int
    evaluation_steps: int
    remedy: str

    def begin(self) -> None:  # noqa: B027  # most begin as they were made
        """Sets the state before the first step."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All that a step depends on beside its number."""

    @abstractmethod
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Sets the state."""

    @abstractmethod
    def step(self, number: int) -> tuple[Figures, int]:
        """Makes the step of a number, from 0; returns its figures and its tokens."""

    @abstractmethod
    def measure(self) -> Figures:
        """The figures of the validation."""

    def check_finite(self, figures: Figures, place: str) -> None:
        """Refuses to go on where a figure has come to nothing."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The {name} is {value} at {place} of the {self.name}: {self.remedy}."
                )


def run_steps(fit: Fit, checkpoints: Checkpoints | None = None, log: Log | None = None) -> History:
    """Makes the steps that are left of a fit, and returns its history.

    Args:
        fit: the fit.
        checkpoints: where the main process writes them, and where the fit goes on from; nowhere if
            None.
        log: told of every step.

    Raises:
        FloatingPointError: a figure is no longer finite.
        OSError: the disk has no room for a checkpoint.
        ValueError: the checkpoint is another fit's, or damaged.
    """
    accelerator = Accelerator()
    show = tqdm.write if accelerator.is_main_process else lambda _: None
    state: dict[str, Any] = {"step": 0, "history": [], "loss": 0.0, "tokens": 0, "seconds": 0.0}
    found = None if checkpoints is None else checkpoints.load(fit.identity)
    if found is None:
        fit.begin()
    else:
        tensors, state = found
        left = f"goes on from step {state['step']} of {fit.num_steps}"
        show(f"The {fit.name} {left if state['step'] < fit.num_steps else 'is complete'}.")
        fit.restore(tensors)
    history, began = state["history"], time.monotonic() - state["seconds"]

    def measure() -> Figures:
        measured = fit.measure()
        fit.check_finite(measured, "the validation")
        entry = {"step": state["step"], **measured}
        if history:
            read = state["tokens"] - history[-1].get("tokens", 0)
            entry |= {"loss": state["loss"] / read, "tokens": state["tokens"]}
            entry["seconds"], state["loss"] = time.monotonic() - began, 0.0
        history.append(entry)
        show(str(entry))
        return measured

    if not history:
        measure()
    bar = {"total": fit.num_steps, "initial": state["step"], "desc": fit.name, "unit": "step"}
    with tqdm(**bar, disable=not accelerator.is_local_main_process) as progress:
        for number in range(state["step"], fit.num_steps):
            step_began, step = time.monotonic(), number + 1
            figures, read = fit.step(number)
            state |= {"step": step, "tokens": state["tokens"] + read}
            state["loss"] += figures["loss"] * read
            progress.update()
            progress.set_postfix(loss=f"{figures['loss']:.3f}")
            figures["tokens_per_second"] = read / max(time.monotonic() - step_began, 1e-9)
            figures["memory_gb"] = _memory(accelerator.device)
            last = step == fit.num_steps
            if last or step % fit.evaluation_steps == 0:
                figures |= {f"validation_{name}": value for name, value in measure().items()}
            if log is not None:
                log(step, figures)
            due = last or step % fit.config.checkpointing_steps == 0
            if checkpoints is not None and accelerator.is_main_process and due:
                facts = {"seconds": time.monotonic() - began, "identity": fit.identity}
                checkpoints.save(step, fit.state(), state | facts)
    return history


def _memory(device: torch.device) -> float:
    """GB that this process uses: the peak on a GPU, what is resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


class GradientFit(Fit):
    """Optimiser steps on clipped gradients; the rate warms up, and falls as a cosine to zero."""

    config: GradientConfig

    def set_up(
        self,
        identity: dict[str, Any],
        trained: dict[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        clipped: Sequence[Sequence[nn.Parameter]] | None = None,
    ) -> None:
        """Says what is trained, and how.

        Args:
            identity: what the fit depends on beside its settings.
            trained: the parameters, under their names in checkpoints.
            optimizers: which train them; the schedule scales the `peak` of a group.
            clipped: parts of what is trained whose gradients are clipped together; all if None.
        """
        config = self.config
        assert config.max_steps is not None
        self.trained, self.optimizers = trained, optimizers
        self.clipped = clipped or [[*trained.values()]]
        self.identity = config.identity() | identity
        self.num_steps, self.evaluation_steps = config.max_steps, config.evaluation_steps
        self.remedy = f"lower `learning_rate` (now {config.learning_rate})"

    @abstractmethod
    def backward(self, number: int) -> tuple[Figures, int]:
        """Sets the gradients of a step; returns its figures and its tokens."""

    def rate(self, number: int) -> float:
        """The share of the peak rate."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * number / self.num_steps)
        return min(self.warmed(number), 1.0) * cosine

    def warmed(self, number: int) -> float:
        """The share of the warm-up that is done."""
        return (number + 1) / max(self.config.warmup_steps or 0, 1)

    def step(self, number: int) -> tuple[Figures, int]:
        """Makes the step of a number."""
        rate = self.rate(number)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * rate
        figures, tokens = self.backward(number)
        norms = [nn.utils.clip_grad_norm_(part, 1.0).item() for part in self.clipped]
        self.check_finite(figures | {"gradient norm": sum(norms)}, f"step {number}")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return figures | {"learning_rate": (self.config.learning_rate or 0) * rate}, tokens

    def state(self) -> dict[str, torch.Tensor]:
        """The parameters, and the optimisers' states, under flat names."""
        return dict(self.trained) | {
            f"optimizer.{number}.{index}.{name}": value
            for number, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Sets them."""
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])
        for number, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for key in (key for key in tensors if key.startswith(f"optimizer.{number}.")):
                *_, index, name = key.split(".", 3)
                states.setdefault(int(index), {})[name] = tensors[key]
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def told_precision(config: GradientConfig) -> str:
    """The precision of a fit on this device, which is said in a line."""
    accelerator = Accelerator()
    chosen = chosen_precision(config.mixed_precision, accelerator.device)
    if config.mixed_precision != "no" and accelerator.is_local_main_process:
        tqdm.write(precision_note(chosen, accelerator.device))
    return chosen


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators, of which dropout draws, and leaves them as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def trained_in_float32(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, made float32: finer steps are lost in bfloat16."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained
