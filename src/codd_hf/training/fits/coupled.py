"""Steps on the coupled likelihood of noised windows (CoDD, arXiv 2603.00045, Eq. 7).

The processes share the chunks of a step's windows; gradients of chunks are summed in float64, so
that a step does not depend on who computed what: AdamW makes as much of a rounding error as of any
gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ...data.canvases import TokenizedExample
from ..loop import Figures, GradientFit, seeded, summed
from ..settings import CoupledConfig
from ..windows import WindowScores


@dataclass
class CoupledFit(GradientFit):
    """Steps on `-log p(x_M | x_O) / t`, over their length, of windows noised at level `t`.

    The head, at the evidence temperature of the settings, is all that is trained of the model.
    """

    train: Sequence[TokenizedExample]
    config: CoupledConfig

    def __post_init__(self) -> None:
        head, temperature = self.model.coupling_head, self.config.evidence_temperature
        if head is None:
            raise ValueError("`model` has no head to fit: give `from_backbone` a head config.")
        if temperature is not None:
            head.config.evidence_temperature = temperature
        self.model.to(Accelerator().device).requires_grad_(False)
        self.head = head.requires_grad_(True)

    @abstractmethod
    def chunks(self, number: int) -> Sequence[torch.Tensor]:
        """The rows of the data in each chunk of a step."""

    @abstractmethod
    def scores(self, rows: torch.Tensor, seed: int) -> WindowScores:
        """The likelihoods of noised windows of some rows."""

    def backward(self, number: int) -> tuple[Figures, int]:
        """Sets the gradients of the mean loss of a step's windows."""
        device, parameters = self.head.device, list(self.trained.values())
        chunks = self.chunks(number)

        def values(chunk: int, rows: torch.Tensor) -> list[torch.Tensor]:
            seed = (self.config.seed * 1_000_003 + number) * 100_003 + chunk
            with seeded(seed, device):
                scores = self.scores(rows, seed)
                loss = -(scores.log_prob / scores.level).sum()
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            sums = (scores.gain.sum(), scores.log_prob.sum(), scores.masked.sum(), loss)
            return [*gradients, torch.stack([value.detach().to(loss) for value in sums])]

        shapes = [*(p.shape for p in parameters), torch.Size([4])]
        *gradients, totals = summed(shapes, chunks, values)
        gain, log_prob, masked, loss = totals.tolist()
        tokens, masked = sum(map(len, chunks)) * self.model.window_length, max(masked, 1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.div_(tokens).to(parameter.dtype)
        figures = {"loss": loss / tokens, "gain": gain / masked, "coupled_nats": -log_prob / masked}
        return figures, tokens

    def rows_of_step(self, number: int, step: int) -> torch.Tensor:
        """Those of `number` rows that a step is on: every epoch is a new permutation."""
        size = min(self.config.windows_per_batch, number)
        epoch, batch = divmod(step, number // size)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(number, generator=generator)[batch * size : (batch + 1) * size]

    def optimizer(self, *groups: dict[str, Any]) -> torch.optim.AdamW:
        """AdamW without weight decay on the circuit, the conditioning, and other groups."""
        maps = self.head.context_maps
        context = [] if maps is None else [*maps.parameters()]
        circuit = [p for n, p in self.head.named_parameters() if not n.startswith("context_maps.")]
        # Gradients of a term that is still a no-op are tiny: hence the tiny `eps`.
        all_groups = [
            {"params": circuit, "peak": self.config.learning_rate, "eps": 1e-15},
            {"params": context, "peak": self.config.context_learning_rate, "eps": 1e-15},
            *groups,
        ]
        chosen = [group for group in all_groups if group["params"]]
        return torch.optim.AdamW(chosen, betas=(0.9, 0.98), weight_decay=0.0)
