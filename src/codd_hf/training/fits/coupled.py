"""A fit to the coupled likelihood of noised windows (CoDD, arXiv 2603.00045, Eq. 7).

The processes share the chunks of a step's windows; gradients of chunks are summed in float64, so
that a step does not depend on who computed what. (Plain averaging would: AdamW's step has no regard
for the size of a gradient, and makes as much of a rounding error where there is no other.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ...modeling_head import CoDDHead
from ..evidence.live_windows import LiveWindows
from ..evidence.noised_windows import NoisedWindows
from ..evidence.scores import WindowScores
from ..loop.gradients import GradientFit
from ..loop.steps import Figures
from ..processes.summing import summed
from ..stage_settings import CoupledConfig


class CoupledFit(GradientFit):
    """Steps on `-log p(x_M | x_O)` of the windows that `chunks` and `windows` choose."""

    config: CoupledConfig
    window_length: int

    @abstractmethod
    def chunks(self, step: int) -> Sequence[torch.Tensor]:
        """The rows of the data in each chunk of a step."""

    @abstractmethod
    def windows(self, step: int, number: int, rows: torch.Tensor) -> NoisedWindows | LiveWindows:
        """The noised windows of a chunk of a number."""

    @abstractmethod
    def score(self, windows: NoisedWindows | LiveWindows) -> WindowScores:
        """Their likelihoods."""

    def backward(self, step: int) -> tuple[Figures, int]:
        """Sets the gradients of the mean loss of a step's windows."""
        parameters = list(self.trained.values())
        device, elbo = parameters[0].device, self.config.loss == "elbo"
        chunks = self.chunks(step)

        def values(number: int, rows: torch.Tensor) -> list[torch.Tensor]:
            windows = self.windows(step, number, rows)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.noise_seed(step) + number)  # of dropout
                try:
                    scores = self.score(windows)
                except ValueError:  # all processes must learn of it, not this one alone
                    return [torch.tensor(torch.nan)] * len(shapes)
                weight = 1 / scores.level if elbo else 1
                loss = -(weight * scores.log_prob).sum()
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            sums = (scores.gain.sum(), scores.log_prob.sum(), scores.masked.sum(), loss)
            return [*gradients, torch.stack([value.detach().double() for value in sums])]

        shapes = [*(p.shape for p in parameters), torch.Size([4])]
        *gradients, totals = summed(shapes, chunks, values, device)
        gain, log_prob, masked, loss = totals.tolist()
        tokens = sum(map(len, chunks)) * self.window_length
        norm = tokens if elbo else max(masked, 1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.div_(norm).to(parameter.dtype)
        figures = {"loss": loss / norm, "gain": gain / max(masked, 1)}
        return figures | {"coupled_nats": -log_prob / max(masked, 1)}, tokens

    def noise_seed(self, step: int) -> int:
        """The seed of a step's noise and dropout; its chunks add their numbers."""
        return (self.config.seed * 1_000_003 + step) * 100_003

    @torch.no_grad()
    def remedy(self, step: int | None) -> str:
        """Which rows have no finite likelihood, and what to lower."""
        if step is None:
            return super().remedy(step)
        bad, reason = [], ""
        for number, rows in enumerate(self.chunks(step)):
            windows = self.windows(step, number, rows)
            for place, row in enumerate(rows.tolist()):
                try:
                    scores = self.score(windows.take(torch.tensor([place])))
                    finite = bool(scores.log_prob.isfinite())
                except ValueError as error:
                    finite, reason = False, f" {error}"
                if not finite:
                    bad.append(row)
        return f", from the windows {bad[:8]} of the data{super().remedy(step)}.{reason}"


def rows_of_step(number: int, size: int, step: int, seed: int) -> torch.Tensor:
    """The rows of a step, a pure function of it: every epoch is a new permutation."""
    size = min(size, number)
    epoch, batch = divmod(step, number // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(number, generator=generator)[batch * size : (batch + 1) * size]


def head_groups(head: CoDDHead, config: CoupledConfig) -> list[dict[str, Any]]:
    """An optimiser's groups: the circuit and, if there is one, the conditioning."""
    groups = {"circuit": [], "context": []}
    for name, parameter in head.named_parameters():
        groups["context" if name.startswith("context_maps.") else "circuit"].append(parameter)
    peaks = {"circuit": config.learning_rate, "context": config.context_learning_rate}
    # Gradients of a term that is still a no-op are tiny: hence the tiny `eps`.
    return [
        {"params": params, "peak": peaks[name], "eps": 1e-15}
        for name, params in groups.items()
        if params
    ]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW without weight decay, as the coupled fits use it."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
