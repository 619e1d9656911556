"""Noised windows with the backbone at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ...data.canvases import CanvasBatch, TokenizedExample
from ...data.noise import draw_windows
from ...modeling_codd import CoDDModel
from ...runtime.precision import autocast
from ..stage_settings import CoupledConfig
from .scores import WindowScores, score_all

EVALUATION_CHUNK = 32


@dataclass
class LiveWindows:
    """Canvases with one noised window a row, which the backbone has not seen yet.

    Attributes:
        canvas: the clean text, `[B, T]`.
        masked: `[B, T]` bool, what the backbone does not see.
        level: `[B]`, the probability with which the window's tokens were masked.
        starts: `[B]`, where each row's window begins.
    """

    canvas: CanvasBatch
    masked: torch.Tensor
    level: torch.Tensor
    starts: torch.Tensor

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
        return cls(canvas, noise.masked, noise.level, starts)

    def take(self, rows: torch.Tensor) -> LiveWindows:
        """Some of them, `rows [B]`."""
        canvas = CanvasBatch(*(tensor[rows] for tensor in vars(self.canvas).values()))
        return LiveWindows(canvas, self.masked[rows], self.level[rows], self.starts[rows])

    def scores(self, model: CoDDModel, config: CoupledConfig) -> WindowScores:
        """The model's likelihoods of their masked tokens."""
        device, config = model.device, config.at_temperature_of(model.coupling_head)
        truth, real = self.canvas.input_ids.to(device), self.canvas.attention_mask.to(device)
        ids = truth.masked_fill(self.masked.to(device), model.config.mask_token_id)
        starts = self.starts.to(device)
        with autocast(config.mixed_precision, device):
            states = model.backbone_states(ids, real)
            distribution = model.window_distribution(
                states, ids, starts, real, temperature=config.evidence_temperature
            )
        columns = starts[:, None] + torch.arange(model.window_length, device=device)
        target = truth.gather(1, columns)
        token = distribution.factorized_logits.gather(-1, target[..., None])[..., 0]
        masked = distribution.masked
        factorized = token.masked_fill(~masked, 0).sum(1)
        gain = distribution.coupling_gain(target)
        return WindowScores(self.level.to(device), masked.sum(1), gain, factorized)


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
    alone, so that models are compared on the same ones.

    Args:
        model: a backbone with a head; it is in evaluation mode after the call.
        tokenizer: its tokenizer.
        examples: the text.
        config: the noise, temperature and precision.
        num_draws: how often each example is drawn.
        seed: of windows and noise.
    """
    model.eval()
    lengths = torch.tensor([len(e.prompt_ids) + len(e.answer_ids) for e in examples])
    order = lengths.argsort(stable=True).split(EVALUATION_CHUNK)
    chunks = [part + draw * len(examples) for draw in range(num_draws) for part in order]

    def score(number: int, rows: torch.Tensor) -> WindowScores:
        part = [examples[row % len(examples)] for row in rows.tolist()]
        place = (part, tokenizer, model.window_length, config, seed * 100_003 + number)
        return LiveWindows.drawn(*place).scores(model, config)

    return score_all(chunks, score, model.device)
