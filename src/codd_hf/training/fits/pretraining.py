"""Masked-diffusion training of a backbone: a new one, or a given one further.

The loss is the diffusion ELBO: the cross-entropy of masked tokens, weighted by `1/t`, over the
number of tokens that could have been masked (LLaDA, arXiv 2502.09992, Eq. 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...backbones import family_of
from ...data.canvases import CanvasBatch, TokenizedExample, batch_indices
from ...data.noise import Noise, draw_canvases
from ...runtime.precision import autocast, chosen_precision
from ..checkpoints import Checkpoints, fit_identity
from ..inputs import TaskStream
from ..loop import (
    Figures,
    GradientFit,
    History,
    Log,
    run_steps,
    seeded,
    told_precision,
    trained_in_float32,
)
from ..settings import PretrainingConfig

BETAS = (0.9, 0.98)
EVALUATION_ROWS = 32
VALIDATION_SEED = 1234


def diffusion_loss(
    model: PreTrainedModel, canvas: CanvasBatch, noise: Noise, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ELBO-weighted loss of a batch (a scalar) and the unweighted loss of its targets `[n]`."""
    truth, device = canvas.input_ids, canvas.input_ids.device
    input_ids = truth.masked_fill(noise.masked.to(device), mask_token_id)
    states = family_of(model.config).states(model, input_ids, canvas.attention_mask)
    rows, columns = noise.target.to(device).nonzero(as_tuple=True)
    losses = F.cross_entropy(
        states.logits((rows, columns)).float(), truth[rows, columns], reduction="none"
    )
    weighted = losses / noise.level.to(device)[rows]
    return weighted.sum() / noise.span.sum().clamp(min=1), losses


def fit_backbone(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample] | TaskStream,
    validation: Sequence[TokenizedExample],
    config: PretrainingConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
    *,
    window_length: int = 32,
    mask_token_id: int | None = None,
) -> History:
    """Trains a backbone in place, by one process.

    An autoregressive decoder becomes a bidirectional one by it. A fit that goes on is given the
    backbone as it was at the start. Settings that are None are completed for a given backbone. The
    mask token is by default the backbone's or the tokenizer's.

    Returns:
        The history: `elbo` (nats per token, an upper bound) and `nats` (per masked token of window
        noise).

    Raises:
        ValueError: the mask token or the backbone's family is not known.
    """
    config = (config or PretrainingConfig()).completed("given")
    named = (
        mask_token_id,
        getattr(backbone.config, "mask_token_id", None),
        tokenizer.mask_token_id,
    )
    mask = next((token for token in named if token is not None), None)
    if mask is None:
        raise ValueError("`mask_token_id` must be given: neither backbone nor tokenizer has one.")
    family_of(backbone.config).make_bidirectional(backbone.config)
    fit = BackboneFit(backbone, tokenizer, train, validation, config, window_length, mask)
    history = run_steps(fit, checkpoints, log)
    backbone.eval()
    return history


@dataclass
class BackboneFit(GradientFit):
    """Steps of a backbone on noised canvases; the rate warms up, stays, and falls as a line."""

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[TokenizedExample] | TaskStream
    validation: Sequence[TokenizedExample]
    config: PretrainingConfig
    window_length: int
    mask_token_id: int
    name = "pretraining"

    def __post_init__(self) -> None:
        config, backbone, train = self.config, self.backbone, self.train
        examples = train.beginning() if isinstance(train, TaskStream) else train
        read = (backbone, self.tokenizer, self.mask_token_id)
        identity = fit_identity(examples, self.validation, *read)
        identity["window_length"] = self.window_length
        self.device, self.precision = Accelerator().device, told_precision(config)
        backbone.to(self.device).train()
        self.validation = sorted(self.validation, key=lambda example: example.length())
        self.batches: Iterator[list[TokenizedExample]] | None = None
        trained = {f"model.{n}": p for n, p in trained_in_float32(backbone).items()}
        self.set_up(identity, trained, _optimizers(backbone, config, self.device))

    def rate(self, number: int) -> float:
        """The share of the peak rate."""
        decay_steps = max(math.ceil(self.num_steps * self.config.decay_fraction), 1)
        return min(self.warmed(number), (self.num_steps - number) / decay_steps, 1.0)

    def backward(self, number: int) -> tuple[Figures, int]:
        """Sets the gradients of the loss of a step's batch."""
        if self.batches is None:
            self.batches = self._batches_from(number)
        seed = self.config.seed * 1_000_003 + number
        generator, examples = torch.Generator().manual_seed(seed), next(self.batches)
        noise = {"window_probability": self.config.window_probability}
        with seeded(seed, self.device):
            loss, losses, canvas, _ = self._loss(examples, generator, **noise)
        loss.backward()
        figures = {"loss": loss.item(), "nats": losses.mean().item()}
        return figures, int(canvas.attention_mask.sum())

    @torch.no_grad()
    def measure(self) -> Figures:
        """ELBO per token of whole answers, and nats per masked token under window noise."""
        self.backbone.eval()
        figures = {}
        for name, window_probability in (("elbo", 0.0), ("nats", 1.0)):
            noise = {"window_probability": window_probability, "prompt_probability": 0.0}
            generator, total, count = torch.Generator().manual_seed(VALIDATION_SEED), 0.0, 0
            for first in range(0, len(self.validation), EVALUATION_ROWS):
                part = self.validation[first : first + EVALUATION_ROWS]
                loss, losses, _, drawn = self._loss(part, generator, **noise)
                size = int(drawn.span.sum()) if name == "elbo" else len(losses)
                total += (loss if name == "elbo" else losses.mean()).item() * size
                count += size
            figures[name] = total / count
        self.backbone.train()
        return figures

    def _loss(
        self, examples: Sequence[TokenizedExample], generator: torch.Generator, **noise: float
    ) -> tuple[torch.Tensor, torch.Tensor, CanvasBatch, Noise]:
        """As `diffusion_loss`, of canvases and noise that are drawn."""
        config = self.config
        drawing = (self.window_length, config.max_extra_windows, generator)
        canvas, drawn = draw_canvases(
            examples, self.tokenizer, *drawing, mean_span_length=config.mean_span_length, **noise
        )
        # Not the accelerator's autocast, which is one for the process: a stage has its precision.
        with autocast(self.precision, self.device):
            place = (canvas.to(self.device), drawn, self.mask_token_id)
            return *diffusion_loss(self.backbone, *place), canvas, drawn

    def _batches_from(self, first: int) -> Iterator[list[TokenizedExample]]:
        size, seed, length = self.config.tokens_per_batch, self.config.seed, self.window_length
        if isinstance(self.train, TaskStream):
            yield from self.train.batches(size, length, seed, first)
        else:
            lengths = [example.length(length) for example in self.train]
            for indices in batch_indices(lengths, size, seed, first):
                yield [self.train[i] for i in indices]


def _optimizers(
    model: PreTrainedModel, config: PretrainingConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon of the hidden matrices if the settings say so."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in trained if p.ndim != 2]
    matrices = [p for p in trained if p.ndim == 2]
    muon = config.optimizer == "muon"
    hidden = [p for p in matrices if muon and id(p) not in embeddings]
    others = [p for p in matrices if not muon or id(p) in embeddings]

    def group(parameters: list[torch.nn.Parameter], decay: float | None) -> dict[str, object]:
        return {"params": parameters, "weight_decay": decay, "peak": config.learning_rate}

    groups = [group(others, config.weight_decay), group(vectors, 0.0)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=BETAS)]
    if hidden:
        kind = torch.optim.Muon if chosen_precision("auto", device) == "bf16" else FloatMuon
        decayed = group(hidden, config.weight_decay)
        optimizers.append(kind([decayed], adjust_lr_fn="match_rms_adamw"))
    return optimizers


class FloatMuon(torch.optim.Muon):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` in float32, where bf16 is emulated."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller has one
        """Makes one step."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                gradient, state = parameter.grad, self.state[parameter]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = _orthogonal(gradient.lerp(momentum, group["momentum"]).float(), group)
                rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate)


def _orthogonal(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """`U S' V^T` of `U S V^T`, with `S'` near the identity, by Newton and Schulz's iteration."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
