"""The loop of every fit: measured now and then, and bit-equal when it goes on after a stop."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.canvases import TokenizedExample
from ..data.sources import tell
from ..modeling_codd import CoDDModel
from ..runtime.precision import chosen_precision, precision_note
from .checkpoints import Checkpoints
from .inputs import TaskStream
from .settings import FitConfig, GradientConfig

VALIDATION_SEED = 1234
Figures = dict[str, float]
History = list[Figures]
"""An entry has the `step` after which it was measured, the figures of the validation, the `tokens`
and the `seconds` since the first step, and the mean `loss` since the last entry."""
Log = Callable[[int, Figures], None]
"""Told of every step of a fit: its number, from 1, and its figures."""


class Fit(ABC):
    """A fit by steps, each a function of its number and of the fit's state alone."""

    name: str
    config: FitConfig
    identity: dict[str, Any]  # all that the fit depends on, as JSON
    num_steps: int
    evaluation_steps: int
    remedy: str  # for a figure that is not finite

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

    def run(self, checkpoints: Checkpoints | None, log: Log | None) -> History:
        """Makes the steps that are left; the main process writes checkpoints.

        Raises:
            FloatingPointError: a figure is no longer finite.
            ValueError: the checkpoint is another fit's, or damaged.
        """
        accelerator = Accelerator()
        done: dict[str, Any] = {"step": 0, "history": [], "loss": 0.0, "tokens": 0, "seconds": 0.0}
        found = None if checkpoints is None else checkpoints.load(self.identity)
        if found is None:
            self.begin()
        else:
            tensors, done = found
            self.restore(tensors)
            tell(f"The {self.name} goes on from step {done['step']} of {self.num_steps}.")
        history, began = done["history"], time.monotonic() - done["seconds"]
        if not history:
            history.append({"step": 0, **self.measure_finite()})
        bar = tqdm(
            range(done["step"], self.num_steps),
            self.name,
            self.num_steps,
            initial=done["step"],
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        for number in bar:
            step, last = number + 1, number + 1 == self.num_steps
            figures, tokens = self.step(number)
            bar.set_postfix(loss=f"{figures['loss']:.3f}")
            done |= {"step": step, "tokens": done["tokens"] + tokens}
            done["loss"] += figures["loss"] * tokens
            if last or step % self.evaluation_steps == 0:
                loss = done["loss"] / (done["tokens"] - history[-1].get("tokens", 0))
                measured, done["loss"] = self.measure_finite(), 0.0
                facts = {"tokens": done["tokens"], "seconds": time.monotonic() - began}
                history.append({"step": step, **measured, "loss": loss, **facts})
                figures |= {f"validation_{name}": value for name, value in measured.items()}
            if log is not None:
                log(step, figures)
            due = last or step % self.config.checkpointing_steps == 0
            if checkpoints is not None and accelerator.is_main_process and due:
                done |= {"seconds": time.monotonic() - began, "identity": self.identity}
                checkpoints.save(step, self.state(), done)
        return history

    def measure_finite(self) -> Figures:
        """Measures, prints the figures and refuses those that are not finite."""
        figures = self.measure()
        tell(f"The {self.name} measures {figures}.")
        self.check_finite(figures, "the validation")
        return figures

    def check_finite(self, figures: Figures, place: str) -> None:
        """Raises a FloatingPointError if a figure is NaN or infinite."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The {name} is {value} at {place} of the {self.name}: {self.remedy}."
                )


@dataclass
class GradientFit(Fit):
    """Optimiser steps on clipped gradients; the rate warms up, and falls as a cosine to zero."""

    model: CoDDModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[TokenizedExample] | TaskStream
    validation: Sequence[TokenizedExample]
    config: GradientConfig

    def set_up(
        self,
        identity: dict[str, Any],
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        clipped: Sequence[Sequence[nn.Parameter]] = (),
    ) -> None:
        """Says what is trained, and how.

        Args:
            identity: what the fit depends on beside its settings.
            module: has the parameters, of which those that require gradients are made float32,
                since finer steps are lost in bfloat16.
            optimizers: which train them; the schedule scales the `peak` of a group.
            clipped: parts of what is trained whose gradients are clipped together; default, all.
        """
        config = self.config
        assert config.max_steps is not None
        assert config.learning_rate is not None
        named = module.named_parameters()
        self.trained = {f"model.{name}": p for name, p in named if p.requires_grad}
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
        self.optimizers, self.peak = optimizers, config.learning_rate
        self.clipped = clipped or [[*self.trained.values()]]
        self.identity = config.identity() | identity
        self.num_steps, self.evaluation_steps = config.max_steps, config.evaluation_steps
        self.remedy = f"lower `learning_rate` (now {self.peak})"

    @abstractmethod
    def backward(self, number: int) -> tuple[Figures, int]:
        """Sets the gradients of a step; returns its figures and its tokens."""

    def rate_factor(self, number: int, warmed: float) -> float:
        """The share of the peak rate, once a share `warmed` of the warm-up is done."""
        return min(warmed, 1.0) * (0.5 + 0.5 * math.cos(math.pi * number / self.num_steps))

    def step(self, number: int) -> tuple[Figures, int]:
        """Makes the step of a number."""
        rate = self.rate_factor(number, (number + 1) / max(self.config.warmup_steps or 0, 1))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * rate
        figures, tokens = self.backward(number)
        norms = [nn.utils.clip_grad_norm_(part, 1.0).item() for part in self.clipped]
        self.check_finite(figures | {"gradient norm": sum(norms)}, f"step {number}")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return figures | {"learning_rate": self.peak * rate}, tokens

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
        """Sets what `state` returned."""
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])
        for number, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for key in (key for key in tensors if key.startswith(f"optimizer.{number}.")):
                *_, index, name = key.split(".", 3)
                states.setdefault(int(index), {})[name] = tensors[key]
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def summed(
    shapes: Sequence[torch.Size],
    chunks: Sequence[torch.Tensor],
    values: Callable[[int, torch.Tensor], Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Sums, of these shapes, of the `values` of all chunks, which the processes share.

    In float64 (where the device has it), so that they do not depend on who computed what.
    """
    accelerator = Accelerator()
    device = accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    for number in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        for total, term in zip(sums, values(number, chunks[number]), strict=True):
            total += term.detach().to(device)
    return accelerator.reduce(sums, "sum")


def announced_precision(config: GradientConfig) -> str:
    """The precision of a fit on this device, which is said in a line."""
    device = Accelerator().device
    chosen = chosen_precision(config.mixed_precision, device)
    if config.mixed_precision != "no":
        tell(precision_note(chosen, device))
    return chosen


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators, of which dropout draws, and leaves them as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
