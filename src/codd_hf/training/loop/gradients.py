"""A fit whose steps are an optimiser's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..stage_settings import GradientConfig
from .steps import Figures, Fit, History


@dataclass
class GradientFit(Fit):
    """Optimiser steps on clipped gradients, at the rates of `config`.

    Attributes:
        name: beside the progress bar.
        config: the settings.
        identity: tells this run from any other, with the settings.
        trained: the parameters, under their names in checkpoints.
        optimizers: which train them; the `peak` of a group is the rate that the schedule scales.
        backward: sets the gradients of a step of a number; returns its figures and its tokens.
        measure: gives the figures of the validation.
        blame: says where a figure of a step that is not finite came from.
        clipped: parts of what is trained whose gradients are clipped together; all if None.
        kept: of a history, the steps whose checkpoints stay.
    """

    name: str
    config: GradientConfig
    identity: dict[str, Any]
    trained: dict[str, torch.nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    backward: Callable[[int], tuple[Figures, int]]
    measure: Callable[[], Figures]
    blame: Callable[[int], str] = lambda step: ""
    clipped: Sequence[Sequence[torch.nn.Parameter]] | None = None
    kept: Callable[[History], list[int]] = lambda history: []

    def __post_init__(self) -> None:
        self.identity = self.config.identity() | self.identity
        self.num_steps, self.evaluation_steps = self.config.max_steps, self.config.evaluation_steps

    def step(self, number: int) -> tuple[Figures, int]:
        """Makes the step of a number."""
        rate = self.config.rate(number)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        figures, tokens = self.backward(number)
        parts = self.clipped or [list(self.trained.values())]
        norms = [torch.nn.utils.clip_grad_norm_(part, 1.0).item() for part in parts]
        self.check_finite(figures | {"gradient norm": sum(norms)}, number)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return figures | {"learning_rate": self.config.learning_rate * rate}, tokens

    def remedy(self, step: int | None) -> str:
        """Where it came from, and what to lower."""
        where = "" if step is None else self.blame(step)
        return f"{where}: lower `learning_rate` (now {self.config.learning_rate})"

    def state(self) -> dict[str, torch.Tensor]:
        """The parameters, and the optimisers' states, under flat names."""
        return dict(self.trained) | {
            f"optimizer.{number}.{index}.{name}": value
            for number, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor] | None) -> None:
        """Sets them; None leaves them as they are."""
        if tensors is None:
            return
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])
        for number, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    *_, index, name = key.split(".", 3)
                    states.setdefault(int(index), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})
