"""Discrete Copula Diffusion (arXiv 2410.01949): a small autoregressive model couples the tokens.

The backbone knows each token's distribution given all visible text, the autoregressive model knows
how tokens depend on each other. A window's tokens are drawn from left to right from

    q(x_i) ~ p_ar(x_i | x_<i) * (p(x_i | visible text) / p(x_i | visible text left of i)) ** alpha

where both factors of the ratio are the backbone's. The paper reads the second one under a causal
mask of attention, `reading="causal"`; `"exact"` masks the tokens on the right instead, at the cost
of one more pass for each run of open tokens that has some on its right. With `alpha=1` and an
autoregressive model that predicts the second factor, whatever was drawn, `q` is the backbone's
prediction.

Differs from the paper in that the autoregressive model is trained here, on the backbone's tasks,
and begins with the backbone's first layers; in `alpha` and the exact reading, which validation
tasks choose; and in that the surest tokens may be committed first, beside the paper's order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from common import Backbone, answer_canvas
from learning import fit, training_tasks
from loop import Pass, surest
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

BATCH = 32
LEAST = -30.0
"""The least log-probability in a ratio."""


def fit_copula(
    backbone: Backbone,
    model: PreTrainedModel,
    seconds: float,
    seed: int = 0,
    learning_rate: float = 1e-3,
) -> None:
    """Trains an autoregressive model of the answers to tasks, for so many processor seconds.

    Its loss is the cross-entropy of the next token, over the windows of the answer.
    """
    batches = training_tasks(seed, BATCH)
    fit(model, lambda: next_token_loss(backbone, model, batches), seconds, learning_rate)


def causal_copy(backbone: Backbone, num_layers: int = 2) -> PreTrainedModel:
    """The first layers of the backbone, with its weights, as an autoregressive model."""
    source = backbone.model.backbone
    config = copy.deepcopy(source.config)
    config.is_causal, config.num_hidden_layers = True, num_layers
    model = type(source)(config)
    model.load_state_dict(source.state_dict(), strict=False)
    model.generation_config = GenerationConfig(pad_token_id=backbone.pad_id)
    return model


def next_token_loss(backbone: Backbone, model: PreTrainedModel, batches: Iterator) -> torch.Tensor:
    """Mean cross-entropy of the tokens of a batch's answers, given all tokens before."""
    canvas = answer_canvas(backbone, next(batches))
    logits = model(input_ids=canvas.tokens, attention_mask=canvas.real.long()).logits[:, :-1]
    place = torch.arange(1, canvas.tokens.shape[1])
    counts = canvas.real[:, 1:] & (place >= canvas.start[:, None])
    return F.cross_entropy(logits[counts].float(), canvas.tokens[:, 1:][counts])


class Copula:
    """Draws a window from left to right from the combination of both models.

    Args:
        model: the autoregressive model.
        alpha: exponent of the backbone's ratio; 0 is the autoregressive model alone.
        reading: of the backbone given what is on the left, `causal` or `exact`.
        order: what a pass commits: the `surest` tokens, or the first ones (`left_to_right`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        alpha: float = 1.0,
        reading: str = "causal",
        order: str = "left_to_right",
    ) -> None:
        self.model, self.alpha, self.order = model, alpha, order
        self.read_left = {"causal": causal_reading, "exact": exact_reading}[reading]

    def draw(self, seen: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Sampler`."""
        ratio = torch.zeros_like(seen.log_probs)
        if self.alpha:  # a token that the backbone rules out has a large finite ratio
            left = self.read_left(seen).clamp(min=LEAST)
            ratio = self.alpha * (seen.log_probs.clamp(min=LEAST) - left)
        prefixes = zip(seen.canvas.tokens, seen.columns[:, 0].tolist(), strict=True)
        rows = [tokens[:first] for tokens, first in prefixes]
        pad = torch.nn.utils.rnn.pad_sequence
        combine = Combine(seen, ratio)
        self.model.generate(
            pad(rows, True, seen.backbone.pad_id, padding_side="left"),
            attention_mask=pad([torch.ones_like(row) for row in rows], True, 0, "left"),
            max_new_tokens=ratio.shape[1],
            do_sample=False,
            logits_processor=[combine],
        )
        tokens, scores = torch.stack(combine.tokens, 1), torch.stack(combine.log_probs, 1)
        if self.order == "left_to_right":
            scores = -torch.arange(scores.shape[1]).expand_as(scores).float()
        return tokens, surest(scores, seen.open, seen.count)


def causal_reading(seen: Pass) -> torch.Tensor:
    """The backbone's log-probabilities `[batch, L, vocab]` under a causal mask of attention."""
    real, model = seen.canvas.real, seen.backbone.model
    size = real.shape[1]
    visible = torch.ones(size, size, dtype=torch.bool).tril() & real[:, None, :]
    visible = visible | torch.eye(size, dtype=torch.bool)  # so that padding sees something
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    states = model.family.states(model.backbone, seen.canvas.tokens, additive[:, None])
    row = torch.arange(len(real))[:, None].expand_as(seen.columns)
    return seen.backbone.log_probs(states.logits((row, seen.columns)))


def exact_reading(seen: Pass) -> torch.Tensor:
    """The backbone's log-probabilities `[batch, L, vocab]` when tokens on the right are masked."""
    backbone, log_probs = seen.backbone, seen.log_probs.clone()
    known = seen.tokens != backbone.mask_id
    for place in range(known.shape[1]):
        begins_run = ~known[:, place] & (known[:, place - 1] if place else True)
        rows = (begins_run & known[:, place:].any(-1)).nonzero()[:, 0]
        if len(rows):
            canvas, columns = seen.canvas.rows(rows), seen.columns[rows]
            hidden = canvas.tokens.scatter(1, columns[:, place:], backbone.mask_id)
            left = Pass.over(backbone, canvas.with_tokens(hidden), columns[:, 0])
            log_probs[rows, place:] = left.log_probs[:, place:]
    return log_probs


class Combine(LogitsProcessor):
    """Turns next-token scores into draws from the combination; known tokens stay.

    Args:
        seen: the pass.
        ratio: `[batch, L, vocab]`, added to the scores.

    Attributes:
        tokens: `[batch]` of each place so far.
        log_probs: `[batch]` of each place so far, of the drawn token under the combination.
    """

    def __init__(self, seen: Pass, ratio: torch.Tensor) -> None:
        self.seen, self.ratio = seen, ratio
        self.tokens: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[batch, vocab]` of which the drawn token is the best."""
        place, backbone = len(self.tokens), self.seen.backbone
        combined = scores.float().log_softmax(-1) + self.ratio[:, place]
        drawn, log_probs = self.seen.pick(backbone.log_probs(combined))
        known = self.seen.tokens[:, place]
        self.tokens.append(torch.where(known == backbone.mask_id, drawn, known))
        self.log_probs.append(log_probs)
        return F.one_hot(self.tokens[-1], scores.shape[-1]).float()
