"""Windows of text under noise, and fits to their likelihood (CoDD, arXiv 2603.00045, Eq. 7).

The processes share the chunks of a step's windows; gradients of chunks are summed in float64, so
that a step does not depend on who computed what: AdamW makes as much of a rounding error as of any
gradient.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..backbones import BackboneStates, noise_of
from ..data.canvases import TokenizedExample
from ..data.noise import draw_canvases
from ..modeling_codd import CoDDModel
from ..runtime.precision import autocast
from .loop import VALIDATION_SEED, Figures, GradientFit, seeded, summed
from .settings import CoupledConfig

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the noise levels that gains are told for."""
ROWS_AT_ONCE = 32


class WindowScores(NamedTuple):
    """Likelihoods of the predicted tokens of noised windows, `[N]` each.

    Those are the masked ones; of uniform noise, which is not told from text, all.
    """

    level: torch.Tensor  # the probability with which tokens were replaced
    masked: torch.Tensor  # how many are predicted
    gain: torch.Tensor  # nats that the circuit adds: log p_w(x) - log Z
    factorized: torch.Tensor  # nats without the circuit; zero where the backbone is not at hand

    @property
    def log_prob(self) -> torch.Tensor:
        """Nats of the masked tokens."""
        return self.factorized + self.gain

    def gains(self) -> dict[str, float]:
        """Mean gain in nats per masked token, of all windows and of each range of levels."""
        result = {"gain": (self.gain.sum() / self.masked.sum()).item()}
        for low, high in itertools.pairwise(LEVELS):
            inside = (self.level >= low) & ((self.level < high) | (high == LEVELS[-1]))
            count = self.masked[inside].sum().clamp(min=1)
            result[f"gain_{low:.2f}-{high:.2f}"] = (self.gain[inside].sum() / count).item()
        return result

    def summary(self) -> dict[str, float]:
        """Nats per masked token, factorized and coupled; their difference, all and by level."""
        total = self.masked.sum()
        nats = {
            "factorized_nats": -(self.factorized.sum() / total).item(),
            "coupled_nats": -(self.log_prob.sum() / total).item(),
        }
        return nats | self.gains()


class NoisedCanvases:
    """Canvases with one noised window a row, as a function of the examples and the seed alone.

    Attributes:
        truth, masked, level, columns, present: of the windows, `[B, L]`, on the CPU; `masked` are
            the tokens that are predicted.
        ids, mask, predicted, starts, end: the noised canvases `[B, T]`, on the model's device.
    """

    def __init__(
        self,
        model: CoDDModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TokenizedExample],
        config: CoupledConfig,
        seed: int,
    ):
        length, generator = model.window_length, torch.Generator().manual_seed(seed)
        layout = examples, tokenizer, length, config.max_extra_windows, generator, config.infill
        spans = config.mean_span_length
        canvas, noise = draw_canvases(
            *layout, model.config.text_config, window_probability=1.0, mean_span_length=spans
        )
        places, end = noise.window[:, None] + torch.arange(length), noise.end[:, None]
        self.columns, self.present = places.clamp(max=canvas.input_ids.shape[1] - 1), places < end
        self.truth = canvas.input_ids.gather(1, self.columns)
        self.masked = noise.predicted.gather(1, self.columns) & self.present
        self.level, seen = noise.level, torch.arange(canvas.input_ids.shape[1]) < end
        ids = noise.applied(canvas.input_ids, model)
        self.predicted = noise.predicted.to(model.device)
        self.ids, self.mask = ids.to(model.device), (canvas.attention_mask * seen).to(model.device)
        self.model, self.starts = model, noise.window.to(model.device)
        self.end = noise.end.to(model.device)
        self.autocast = autocast(config.mixed_precision, model.device)

    def states(self) -> BackboneStates:
        """A pass of the backbone."""
        model, size = self.model, self.model.config.canvas_length
        if size is None:
            return model.backbone_states(self.ids, self.mask)
        family: Any = model.family
        return family.canvas_states(model.backbone, self.ids, self.end - size)

    def scores(self) -> WindowScores:
        """The model's likelihoods of the masked tokens."""
        with self.autocast:
            states = self.states()
            where = states, self.ids, self.starts, self.mask
            distribution = self.model.window_distribution(*where, predicted=self.predicted)
        truth, masked = self.truth.to(self.ids.device), distribution.masked
        token = distribution.factorized_logits.gather(-1, truth[..., None])[..., 0]
        factorized, gain = token.masked_fill(~masked, 0).sum(1), distribution.coupling_gain(truth)
        return WindowScores(self.level.to(truth.device), masked.sum(1), gain, factorized)


def window_scores(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: CoupledConfig,
    num_draws: int = 4,
    seed: int = VALIDATION_SEED,
) -> WindowScores:
    """Scores one noised window of each example a draw, `[num_draws * len(examples)]`.

    Windows and noise do not depend on the model, which is in evaluation mode afterwards.
    """
    model.eval()
    lengths = torch.tensor([example.length() for example in examples])
    order = lengths.argsort(stable=True).split(ROWS_AT_ONCE)
    chunks = [part + draw * len(examples) for draw in range(num_draws) for part in order]

    def score(number: int, rows: torch.Tensor) -> WindowScores:
        part = [examples[row % len(examples)] for row in rows.tolist()]
        return NoisedCanvases(model, tokenizer, part, config, seed * 100_003 + number).scores()

    return score_all(chunks, score)


@torch.no_grad()
def score_all(
    chunks: Sequence[torch.Tensor], score: Callable[[int, torch.Tensor], WindowScores]
) -> WindowScores:
    """Scores of all windows, whose rows the processes share in chunks; all get the result."""
    total = sum(map(len, chunks))

    def placed(number: int, rows: torch.Tensor) -> list[torch.Tensor]:
        table = torch.zeros(4, total)
        table[:, rows] = torch.stack([column.float().cpu() for column in score(number, rows)])
        return [table]

    (table,) = summed([torch.Size((4, total))], chunks, placed)
    return WindowScores(*table.cpu())


@dataclass
class CoupledFit(GradientFit):
    """Steps on `-log p(x_M | x_O) / t`, over their length, of windows noised at level `t`.

    Of uniform noise all tokens of a window are predicted whatever the level: the loss is not
    divided by it. The head, at the evidence temperature of the settings, is all that is trained of
    the model.
    """

    train: Sequence[TokenizedExample]
    config: CoupledConfig

    def __post_init__(self) -> None:
        head, temperature = self.model.coupling_head, self.config.evidence_temperature
        if head is None:
            raise ValueError("`model` has no head to fit: give `from_backbone` a head config.")
        self.is_uniform = noise_of(self.model.config.text_config) == "uniform"
        if self.is_uniform and self.config.infill:
            raise ValueError(
                "`infill` is about mask tokens, but the noise of this backbone is uniform: leave "
                "it out."
            )
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
                losses = -scores.log_prob
                loss = (losses if self.is_uniform else losses / scores.level).sum()
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
