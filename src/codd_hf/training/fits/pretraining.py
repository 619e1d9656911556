"""Diffusion training of a backbone: a new one, or a given one further.

From masks the loss is the diffusion ELBO: the cross-entropy of masked tokens, weighted by `1/t`,
over the number of tokens that could have been masked (LLaDA, arXiv 2502.09992, Eq. 3). From uniform
noise it is the cross-entropy of the clean tokens at all positions that could have been replaced
(the second term of D3PM's, arXiv 2107.03006, Eq. 5): what a pass of decoding draws from, at all
levels alike. `uniform_bound` is its ELBO, which is measured.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ...data.canvases import CanvasBatch, TokenizedExample, batch_indices
from ...data.fingerprint import identity_of
from ...data.noise import Noise, draw_canvases
from ...modeling_codd import CoDDModel
from ...runtime.precision import autocast, chosen_precision
from ..checkpoints import Checkpoints
from ..inputs import TaskStream
from ..loop import (
    VALIDATION_SEED,
    Figures,
    GradientFit,
    History,
    Log,
    announced_precision,
    seeded,
)
from ..settings import PretrainingConfig

BETAS = (0.9, 0.98)
EVALUATION_ROWS = 32


def diffusion_loss(
    model: CoDDModel, canvas: CanvasBatch, noise: Noise, is_bound: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch (a scalar) and the cross-entropy of each of its targets `[n]`.

    With `is_bound` the former is the ELBO for uniform noise too.
    """
    truth, device = canvas.input_ids, canvas.input_ids.device
    ids = noise.applied(truth, model)
    states = model.family.states(model.backbone, ids, canvas.attention_mask)
    rows, columns = noise.target.to(device).nonzero(as_tuple=True)
    logits = states.logits((rows, columns)).float()
    losses = F.cross_entropy(logits, truth[rows, columns], reduction="none")
    weighted, level = losses, noise.level.to(device)[rows]
    if noise.tokens is None:
        weighted = losses / level
    elif is_bound:
        found = truth[rows, columns], ids[rows, columns]
        weighted = uniform_bound(logits.log_softmax(-1), *found, level)
    return weighted.sum() / noise.span.sum().clamp(min=1), losses


def uniform_bound(
    log_probs: torch.Tensor, truth: torch.Tensor, seen: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """`[n]`: nats whose mean over levels bounds those of a token (arXiv 2205.14987, Prop. 2).

    A token that is seen as `z` at level `t` jumps back to `v` at `1 / ((1 - t) V)` times the rate
    `s(v) = sum_x p(x | z) l(v | x) / l(z | x)`, with `l(v | x) = (1 - t) [v = x] + t / V`. With
    `r(v)` in its place where the clean token `x` is known, the bound is the sum of
    `s - r + r log(r / s)` over `v`.

    Args:
        log_probs: `[n, V]`, of clean tokens, `p(x | z)`.
        truth: `[n]`, the clean tokens.
        seen: `[n]`, those at the same places.
        level: `[n]`, `t`.
    """
    size, kept = log_probs.shape[-1], (1 - level.double()).clamp(min=1e-4)[:, None]
    noise, seen = (1 - kept) / size, seen[:, None]

    def rates(law: torch.Tensor) -> torch.Tensor:
        same = law.gather(1, seen)
        return 1 - same * kept / (kept + noise) + law * kept / noise

    known, found = rates(F.one_hot(truth, size).double()), rates(log_probs.double().exp())
    terms = (found - known + known * (known / found).log()).scatter(1, seen, 0.0)
    return (terms.sum(1) / (kept[:, 0] * size)).to(log_probs.dtype)


def fit_backbone(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample] | TaskStream,
    validation: Sequence[TokenizedExample],
    config: PretrainingConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
    *,
    window_length: int = 32,
) -> History:
    """Trains `model.backbone` in place, by one process.

    A fit that goes on is given the backbone as it was at the start. Settings that are None are
    completed for a given backbone. The history has `elbo` (nats per token, an upper bound) and
    `nats` (per target of window noise).
    """
    config = (config or PretrainingConfig()).completed("given")
    fit = _BackboneFit(model, tokenizer, train, validation, config, window_length)
    history = fit.run(checkpoints, log)
    model.eval()
    return history


@dataclass
class _BackboneFit(GradientFit):
    """Steps of a backbone on noised canvases; the rate warms up, stays, and falls as a line."""

    config: PretrainingConfig
    window_length: int
    name = "pretraining"

    def __post_init__(self) -> None:
        model, config, train = self.model, self.config, self.train
        data = train.beginning() if isinstance(train, TaskStream) else train
        validation = self.validation
        identity = identity_of(model, self.tokenizer, data=data, validation_data=validation)
        self.validation = sorted(validation, key=lambda example: example.length())
        self.device = Accelerator().device
        announced_precision(config)
        backbone = model.to(self.device).backbone.train()
        optimizers = _optimizers(model, config, self.device)
        self.batches: Iterator[list[TokenizedExample]] | None = None
        identity["window_length"] = self.window_length
        self.set_up(identity, backbone, optimizers)

    def rate_factor(self, number: int, warmed: float) -> float:
        decay_steps = max(math.ceil(self.num_steps * self.config.decay_fraction), 1)
        return min(warmed, (self.num_steps - number) / decay_steps, 1.0)

    def backward(self, number: int) -> tuple[Figures, int]:
        if self.batches is None:
            self.batches = self._batches_from(number)
        seed, share = self.config.seed * 1_000_003 + number, self.config.window_probability
        generator = torch.Generator().manual_seed(seed)
        with seeded(seed, self.device):
            loss, losses, canvas, _ = self._loss(next(self.batches), generator, share)
        loss.backward()
        figures = {"loss": loss.item(), "nats": losses.mean().item()}
        return figures, int(canvas.attention_mask.sum())

    @torch.no_grad()
    def measure(self) -> Figures:
        self.model.backbone.eval()
        figures = {}
        for name, share in (("elbo", 0.0), ("nats", 1.0)):
            generator, total, count = torch.Generator().manual_seed(VALIDATION_SEED), 0.0, 0
            for first in range(0, len(self.validation), EVALUATION_ROWS):
                part = self.validation[first : first + EVALUATION_ROWS]
                draw = {"prompt_probability": 0.0}
                loss, losses, _, noise = self._loss(part, generator, share, True, **draw)
                size = int(noise.span.sum()) if name == "elbo" else len(losses)
                total += (loss if name == "elbo" else losses.mean()).item() * size
                count += size
            figures[name] = total / count
        self.model.backbone.train()
        return figures

    def _loss(
        self,
        examples: Sequence[TokenizedExample],
        generator: torch.Generator,
        window_probability: float,
        is_bound: bool = False,
        **noise: float,
    ) -> tuple[torch.Tensor, torch.Tensor, CanvasBatch, Noise]:
        """As `diffusion_loss`, of canvases and noise that are drawn."""
        canvas, drawn = draw_canvases(
            examples,
            self.tokenizer,
            self.window_length,
            self.config.max_extra_windows,
            generator,
            False,
            self.model.config.text_config,
            mean_span_length=self.config.mean_span_length,
            window_probability=window_probability,
            **noise,
        )
        # Not the accelerator's autocast, which is one for the process: a stage has its precision.
        with autocast(self.config.mixed_precision, self.device):
            found = diffusion_loss(self.model, canvas.to(self.device), drawn, is_bound)
        return *found, canvas, drawn

    def _batches_from(self, first: int) -> Iterator[list[TokenizedExample]]:
        size, seed, length = self.config.tokens_per_batch, self.config.seed, self.window_length
        train = self.train
        if isinstance(train, TaskStream):
            return train.batches(size, length, seed, first)
        batches = batch_indices([e.length(length) for e in train], size, seed, first)
        return ([train[i] for i in indices] for indices in batches)


def _optimizers(
    model: CoDDModel, config: PretrainingConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon of the hidden matrices if the settings say so."""
    layers = (model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings())
    embeddings = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, "peak": config.learning_rate}
        for decay in (config.weight_decay, 0.0, config.weight_decay)
    ]
    matrices, vectors, hidden = (group["params"] for group in groups)
    for parameter in (p for p in model.backbone.parameters() if p.requires_grad):
        by_muon = config.optimizer == "muon" and id(parameter) not in embeddings
        (vectors if parameter.ndim != 2 else hidden if by_muon else matrices).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups[:2], betas=BETAS)]
    if hidden:
        has_bf16 = chosen_precision("auto", device) == "bf16"
        make = torch.optim.Muon if has_bf16 else FloatMuon
        optimizers.append(make([groups[2]], adjust_lr_fn="match_rms_adamw"))
    return optimizers


class FloatMuon(torch.optim.Muon):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` in float32, where bf16 is emulated."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller has one
        """Makes one step."""
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                gradient, state = parameter.grad, self.state[parameter]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]).float()
                tall = update.shape[0] > update.shape[1]
                x = update.T if tall else update
                x = x / x.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):  # Newton and Schulz's iteration
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_((x.T if tall else x).to(parameter.dtype), alpha=-rate)
