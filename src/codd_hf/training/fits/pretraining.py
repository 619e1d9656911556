"""Masked-diffusion training of a backbone: a new one, or a given one further.

The loss is the diffusion ELBO: the cross-entropy of masked tokens, weighted by `1/t`, over the
number of tokens that could have been masked (LLaDA, arXiv 2502.09992, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...backbones import family_of
from ...data.canvases import CanvasBatch, TokenizedExample, batch_indices
from ...data.noise import Noise, draw_canvases
from ...runtime import precision
from ..identity import backbone_identity, data_identity
from ..loop.checkpoints import Checkpoints
from ..loop.gradients import GradientFit
from ..loop.steps import Figures, History, run_steps
from ..loop.trackers import Log
from ..stage_settings import PretrainingConfig
from ..task_stream import TaskStream
from .lora import trained_in_float32
from .muon import FloatMuon

BETAS = (0.9, 0.98)
EVALUATION_ROWS = 32
VALIDATION_SEED = 1234


def small_backbone_config(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 256,
    num_layers: int = 4,
    max_position_embeddings: int = 2048,
) -> LlamaConfig:
    """A bidirectional Llama of a few million parameters (the embedded default's shape).

    Raises:
        ValueError: a head of attention would not have an even number of features.
    """
    num_heads = max(hidden_size // 64, 1)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"`hidden_size` must give each of {num_heads} attention heads an even number of "
            f"features, got {hidden_size}: take a multiple of 64."
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        is_causal=False,
    )


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
    family_of(backbone.config).make_bidirectional(backbone.config)
    for found in (getattr(backbone.config, "mask_token_id", None), tokenizer.mask_token_id):
        mask_token_id = found if mask_token_id is None else mask_token_id
    if mask_token_id is None:
        raise ValueError("`mask_token_id` must be given: neither backbone nor tokenizer has one.")
    stream = isinstance(train, TaskStream)
    identity = data_identity(train.beginning() if stream else train, validation)
    identity |= backbone_identity(backbone, tokenizer, mask_token_id)
    identity["window_length"] = window_length
    device = Accelerator().device
    chosen = precision.chosen_precision(config.mixed_precision, device)
    tqdm.write(precision.precision_note(chosen, device))
    backbone.to(device).train()
    trained_in_float32(backbone)
    trained = {f"model.{n}": p for n, p in backbone.named_parameters() if p.requires_grad}
    validation = sorted(validation, key=lambda example: example.length())
    position: list[Iterator[list[TokenizedExample]]] = []

    def batches(first: int) -> Iterator[list[TokenizedExample]]:
        if stream:
            yield from train.batches(config.tokens_per_batch, window_length, config.seed, first)
        lengths = [example.length(window_length) for example in train]
        for indices in batch_indices(lengths, config.tokens_per_batch, config.seed, first):
            yield [train[i] for i in indices]

    def loss_of(
        examples: Sequence[TokenizedExample], generator: torch.Generator, **noise: float
    ) -> tuple[torch.Tensor, torch.Tensor, CanvasBatch, Noise]:
        canvas, drawn = draw_canvases(
            examples,
            tokenizer,
            window_length,
            config.max_extra_windows,
            generator,
            mean_span_length=config.mean_span_length,
            **noise,
        )
        # Not the accelerator's autocast, which is one for the process: a stage has its precision.
        with precision.autocast(chosen, device):
            losses = diffusion_loss(backbone, canvas.to(device), drawn, mask_token_id)
        return *losses, canvas, drawn

    def backward(step: int) -> tuple[Figures, int]:
        if not position:
            position.append(batches(step))
        seed = config.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # of dropout
            noise = {"window_probability": config.window_probability}
            loss, losses, canvas, _ = loss_of(next(position[0]), generator, **noise)
        loss.backward()
        figures = {"loss": loss.item(), "nats": losses.mean().item()}
        return figures, int(canvas.attention_mask.sum())

    @torch.no_grad()
    def measure() -> Figures:
        """ELBO per token of whole answers, and nats per masked token under window noise."""
        backbone.eval()
        parts = range(0, len(validation), EVALUATION_ROWS)
        totals = {}
        for name, window_probability in (("elbo", 0.0), ("nats", 1.0)):
            noise = {"window_probability": window_probability, "prompt_probability": 0.0}
            generator, total, count = torch.Generator().manual_seed(VALIDATION_SEED), 0.0, 0
            for first in parts:
                part = validation[first : first + EVALUATION_ROWS]
                loss, losses, _, drawn = loss_of(part, generator, **noise)
                size = int(drawn.span.sum()) if name == "elbo" else len(losses)
                total += (loss if name == "elbo" else losses.mean()).item() * size
                count += size
            totals[name] = total / count
        backbone.train()
        return totals

    optimizers = _optimizers(backbone, config, device)
    fit = GradientFit("pretraining", config, identity, trained, optimizers, backward, measure)
    history = run_steps(fit, checkpoints, log, alone=True)
    backbone.eval()
    return history


def _optimizers(
    model: PreTrainedModel, config: PretrainingConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    hidden, others, vectors = [], [], []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if parameter.ndim != 2:
            vectors.append(parameter)
        elif config.optimizer == "muon" and id(parameter) not in embeddings:
            hidden.append(parameter)
        else:
            others.append(parameter)
    common = {"peak": config.learning_rate}
    groups = [
        {"params": others, "weight_decay": config.weight_decay, **common},
        {"params": vectors, "weight_decay": 0.0, **common},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=BETAS)]
    if hidden:
        kind = torch.optim.Muon if precision.computes_bf16(device) else FloatMuon
        group = {"params": hidden, "weight_decay": config.weight_decay, **common}
        optimizers.append(kind([group], adjust_lr_fn="match_rms_adamw"))
    return optimizers
