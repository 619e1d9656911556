"""Noised windows with the backbone at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ...circuits import ListedEvidence
from ...circuits.factorized import forbidden_tokens
from ...data.canvases import CanvasBatch, TokenizedExample
from ...data.noise import draw_windows
from ...modeling_codd import CoDDModel
from ...runtime.precision import autocast
from ..stage_settings import ConditionalConfig, CoupledConfig
from .noised_windows import NoisedWindows
from .scores import WindowScores, score_all

EVALUATION_CHUNK = 32


@dataclass
class LiveWindows:
    """Canvases with one noised window a row, which the backbone has not seen yet.

    Attributes:
        canvas: the clean text, `[B, T]`.
        masked: `[B, T]` bool, the positions that the backbone does not see.
        level: `[B]`, the probability with which the window's tokens were masked.
        starts: `[B]`, where each row's window begins.
        window_length: tokens in a window.
    """

    canvas: CanvasBatch
    masked: torch.Tensor
    level: torch.Tensor
    starts: torch.Tensor
    window_length: int

    @classmethod
    def drawn(
        cls,
        examples: Sequence[TokenizedExample],
        tokenizer: PreTrainedTokenizerBase,
        window_length: int,
        config: CoupledConfig,
        seed: int,
    ) -> LiveWindows:
        """A window of each example, as a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        extra, span = config.max_extra_windows, config.mean_span_length
        drawn = draw_windows(examples, tokenizer, window_length, extra, generator, span)
        canvas, noise, starts = drawn
        return cls(canvas, noise.masked, noise.level, starts, window_length)

    @property
    def columns(self) -> torch.Tensor:
        """`[B, L]`, the positions of each window."""
        return self.starts[:, None] + torch.arange(self.window_length)

    def take(self, rows: torch.Tensor) -> LiveWindows:
        """Some of them, `rows [B]`."""
        canvas = CanvasBatch(*(tensor[rows] for tensor in vars(self.canvas).values()))
        parts = (self.masked[rows], self.level[rows], self.starts[rows])
        return LiveWindows(canvas, *parts, self.window_length)

    def on(self, model: CoDDModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The noised ids, the attention mask and the starts, on the model's device."""
        device = model.device
        ids = self.canvas.input_ids.masked_fill(self.masked, model.config.mask_token_id)
        return ids.to(device), self.canvas.attention_mask.to(device), self.starts.to(device)

    def scores(self, model: CoDDModel, config: CoupledConfig) -> WindowScores:
        """The model's likelihoods of their masked tokens."""
        device = model.device
        ids, real, starts = self.on(model)
        with autocast(config.mixed_precision, device):
            states = model.backbone_states(ids, real)
            distribution = model.window_distribution(
                states, ids, starts, real, temperature=config.evidence_temperature
            )
        truth = self.canvas.input_ids.gather(1, self.columns).to(device)
        token = distribution.factorized_logits.gather(-1, truth[..., None])[..., 0]
        masked = distribution.masked
        factorized = token.masked_fill(~masked, 0).sum(1)
        gain = distribution.coupling_gain(truth)
        return WindowScores(self.level.to(device), masked.sum(1), gain, factorized)

    @torch.no_grad()
    def predictions(self, model: CoDDModel, config: ConditionalConfig) -> NoisedWindows:
        """The backbone's predictions about them; hidden states if the head is conditioned."""
        device, rows = model.device, torch.arange(len(self.starts))[:, None]
        maps = None if model.coupling_head is None else model.coupling_head.context_maps
        size = (model.config.vocab_size, model.config.mask_token_id)
        forbidden = forbidden_tokens(*size, model.config.forbidden_token_ids, device)
        ids, real, starts = self.on(model)
        masked = self.masked[rows, self.columns]
        window, column = masked.nonzero(as_tuple=True)
        places = (window.to(device), self.columns[window, column].to(device))
        with autocast(config.mixed_precision, device):
            states = model.backbone_states(ids, real)
            logits = states.logits(places)
        kept = ListedEvidence.from_logits(
            logits, min(config.cache_size, size[0]), config.evidence_temperature, forbidden
        )
        context = {}
        if maps is not None:
            hidden = states.last_hidden_state[rows.to(device), self.columns.to(device)]
            context["hidden"] = hidden.to("cpu", torch.bfloat16)
        if maps is not None and maps.copies:
            before = model.preceding(states, ids, starts, real)
            context["preceding_tokens"] = before.tokens.masked_fill(~before.present, -1).int().cpu()
            context["preceding_hidden"] = before.hidden.to("cpu", torch.bfloat16)
        return NoisedWindows(
            self.canvas.input_ids[rows, self.columns].int(),
            masked,
            self.level,
            kept.indices.int().cpu(),
            kept.log_probs.to("cpu", torch.float16),
            kept.log_rest[..., 0].to("cpu", torch.float16),
            **context,
        )


def window_scores(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: CoupledConfig,
    num_draws: int = 4,
    seed: int = 1234,
) -> WindowScores:
    """Scores one noised window of each example a draw, `[num_draws * len(examples)]`.

    Windows and noise depend on the examples, `seed`, `max_extra_windows` and `mean_span_length`
    alone, so that models are compared on the same ones. The model is in evaluation mode afterwards.
    """
    model.eval()
    lengths = torch.tensor([example.length() for example in examples])
    order = lengths.argsort(stable=True).split(EVALUATION_CHUNK)
    chunks = [part + draw * len(examples) for draw in range(num_draws) for part in order]

    def score(number: int, rows: torch.Tensor) -> WindowScores:
        part = [examples[row % len(examples)] for row in rows.tolist()]
        place = (part, tokenizer, model.window_length, config, seed * 100_003 + number)
        return LiveWindows.drawn(*place).scores(model, config)

    return score_all(chunks, score, model.device)
