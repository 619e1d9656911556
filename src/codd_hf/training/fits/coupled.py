"""Gradients of the coupled likelihood of noised windows (CoDD, arXiv 2603.00045, Eq. 7).

The processes share the chunks of a step's windows; gradients of chunks are summed in float64, so
that a step does not depend on who computed what. (Plain averaging would: AdamW's step has no regard
for the size of a gradient, and makes as much of a rounding error where there is no other.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...modeling_head import CoDDHead
from ..evidence.live_windows import LiveWindows
from ..evidence.noised_windows import NoisedWindows
from ..evidence.scores import WindowScores
from ..loop.steps import Figures
from ..processes.summing import summed
from ..stage_settings import CoupledConfig

Windows = NoisedWindows | LiveWindows


@dataclass
class CoupledSteps:
    """Steps on `-log p(x_M | x_O) / t` of windows that were noised at level `t`, over their length.

    Attributes:
        config: the settings.
        parameters: what is trained.
        window_length: tokens in a window.
        chunks: gives the rows of the data in each chunk of a step.
        windows: gives the noised windows of some rows, of a seed.
        score: gives their likelihoods.
    """

    config: CoupledConfig
    parameters: Sequence[torch.nn.Parameter]
    window_length: int
    chunks: Callable[[int], Sequence[torch.Tensor]]
    windows: Callable[[torch.Tensor, int], Windows]
    score: Callable[[Windows], WindowScores]

    def backward(self, step: int) -> tuple[Figures, int]:
        """Sets the gradients of the mean loss of a step's windows."""
        device = self.parameters[0].device
        chunks = self.chunks(step)
        shapes = [*(p.shape for p in self.parameters), torch.Size([4])]

        def values(number: int, rows: torch.Tensor) -> list[torch.Tensor]:
            seed = self.seed(step, number)
            windows = self.windows(rows, seed)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)  # of dropout
                try:
                    scores = self.score(windows)
                except ValueError:  # all processes must learn of it, not this one alone
                    return [torch.tensor(torch.nan)] * len(shapes)
                loss = -(scores.log_prob / scores.level).sum()
                gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            sums = (scores.gain.sum(), scores.log_prob.sum(), scores.masked.sum(), loss)
            return [*gradients, torch.stack([value.detach().to(loss) for value in sums])]

        *gradients, totals = summed(shapes, chunks, values, device)
        gain, log_prob, masked, loss = totals.tolist()
        tokens, masked = sum(map(len, chunks)) * self.window_length, max(masked, 1)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.div_(tokens).to(parameter.dtype)
        figures = {"loss": loss / tokens, "gain": gain / masked, "coupled_nats": -log_prob / masked}
        return figures, tokens

    def seed(self, step: int, number: int) -> int:
        """The seed of the noise and the dropout of a chunk."""
        return (self.config.seed * 1_000_003 + step) * 100_003 + number

    @torch.no_grad()
    def blame(self, step: int) -> str:
        """Which rows of a step have no finite likelihood."""
        bad, reason = [], ""
        for number, rows in enumerate(self.chunks(step)):
            windows = self.windows(rows, self.seed(step, number))
            for place, row in enumerate(rows.tolist()):
                try:
                    scores = self.score(windows.take(torch.tensor([place])))
                    finite = bool(scores.log_prob.isfinite())
                except ValueError as error:
                    finite, reason = False, f" ({error})"
                if not finite:
                    bad.append(row)
        return f", from the windows {bad[:8]} of the data{reason}"


def rows_of_step(number: int, size: int, step: int, seed: int) -> torch.Tensor:
    """The rows of a step, a pure function of it: every epoch is a new permutation."""
    size = min(size, number)
    epoch, batch = divmod(step, number // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(number, generator=generator)[batch * size : (batch + 1) * size]


def head_optimizer(
    head: CoDDHead, config: CoupledConfig, *groups: dict[str, Any]
) -> torch.optim.AdamW:
    """AdamW without weight decay on the circuit, the conditioning, and other groups."""
    of_context = {True: [], False: []}
    for name, parameter in head.named_parameters():
        of_context[name.startswith("context_maps.")].append(parameter)
    peaks = {True: config.context_learning_rate, False: config.learning_rate}
    # Gradients of a term that is still a no-op are tiny: hence the tiny `eps`.
    circuit, context = (
        {"params": of_context[kind], "peak": peaks[kind], "eps": 1e-15} for kind in (False, True)
    )
    chosen = [group for group in (circuit, context, *groups) if group["params"]]
    return torch.optim.AdamW(chosen, betas=(0.9, 0.98), weight_decay=0.0)
