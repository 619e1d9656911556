"""From a step's distribution to its tokens: candidates drawn independently of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..checks.arguments import RowError
from ..circuits.numerics import one_hot_log_probs
from ..circuits.random import Generators, draw_categorical, uniform
from .controls import RowText, controlled
from .settings import DrawSettings
from .strategies import choose
from .windows import CoupledWindows


class Drawn(NamedTuple):
    """The tokens of a step.

    Attributes:
        tokens: `[batch, length]`, with the step's tokens committed.
        where: `[batch, length]` bool, where that is.
        candidates: `[batch, length]`, committed or not.
        probs: `[batch, length]`, confidence in the candidates.
        pred_logits: `[batch, length, vocab]`, what they were drawn from; None if nobody asked.
    """

    tokens: torch.Tensor
    where: torch.Tensor
    candidates: torch.Tensor
    probs: torch.Tensor
    pred_logits: torch.Tensor | None


@dataclass
class Step:
    """What a step draws from, and how.

    Attributes:
        windows: the distribution.
        sample: `[batch, length]`, the tokens before the step.
        settings: of the call.
        committable: `[batch, length]` bool, where a token may be committed.
        at_least: `[batch]`, the fewest tokens to commit, if there are so many.
        text: the rows before the step; None where nothing looks at it.
        processor: transformers' processors, if any.
        generator: one for all, or one per row.
        output_logits: whether to return `pred_logits`.
    """

    windows: CoupledWindows
    sample: torch.Tensor
    settings: DrawSettings
    committable: torch.Tensor
    at_least: torch.Tensor
    text: RowText | None
    processor: LogitsProcessor | LogitsProcessorList | None
    generator: Generators
    output_logits: bool

    def uniforms(self) -> torch.Tensor | None:
        """A number in [0, 1) for each position; None where nothing is random."""
        if self.settings.is_greedy or self.settings.sampling == "viterbi":
            return None
        return uniform(self.sample.shape, self.generator, self.sample.device)

    def control(self, scores: torch.Tensor, rows: torch.Tensor, text: RowText) -> torch.Tensor:
        """Scores `[n, vocab]` of rows `[n]` after repetition penalty and processors."""
        return controlled(scores, rows, text, self.settings.repetition_penalty, self.processor)

    def draw(
        self, scores: torch.Tensor, uniforms: torch.Tensor | None, rows: torch.Tensor, wanted=True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draws tokens, as the settings shape their probabilities.

        Args:
            scores: `[*batch, vocab]` log-probabilities; -inf where a token is impossible.
            uniforms: `[*batch]` numbers in [0, 1); None for the most probable tokens.
            rows: `[*batch]`, the row of each, for errors.
            wanted: `[*batch]` bool, where a token must be possible.

        Returns:
            Tokens `[*batch]`, and the log-probabilities `[*batch, vocab]` they were drawn from if
            these are asked for.

        Raises:
            RowError: no token is possible where one is wanted, or a score is NaN or infinite.
        """
        if uniforms is None:
            best, tokens = scores.max(-1)
            undefined = ~best.isfinite()
            shaped = one_hot_log_probs(tokens, scores) if self.output_logits else None
        else:
            shaped = shape_logits(
                scores, self.settings.temperature, self.settings.top_k, self.settings.top_p
            )
            undefined = shaped[..., 0].isnan()
            tokens = draw_categorical(shaped.exp(), uniforms)
        undefined = undefined & wanted
        if bool(undefined.any()):
            raise RowError(
                "No token can be drawn in row {row}: `forbidden_token_ids`, `logits_processor` and "
                "what the model never generates leave none, or a logit is NaN or infinite.",
                int(rows[undefined][0]),
            )
        return tokens, shaped


def draw_independently(step: Step) -> Drawn:
    """Draws a candidate for every masked position; the strategy chooses among them."""
    windows, settings = step.windows, step.settings
    scores = windows.candidate_logits(settings, step.generator)
    if step.text is not None:
        at = windows.masked.nonzero(as_tuple=True)
        scores = scores.index_put(at, step.control(scores[at], at[0], step.text))
    rows = torch.arange(len(step.sample), device=scores.device)[:, None].expand_as(step.sample)
    drawn, logits = step.draw(scores, step.uniforms(), rows, step.committable)
    candidates = torch.where(windows.masked, drawn, step.sample)
    probs = windows.probs_of(candidates)
    where = choose(
        settings, windows, candidates, probs, step.committable, step.at_least, step.generator
    )
    return Drawn(torch.where(where, candidates, step.sample), where, candidates, probs, logits)


def shape_logits(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Log-probabilities after temperature, then top-k, then top-p.

    Args:
        logits: `[..., vocab]`; -inf where a token is impossible.
        temperature: divides the logits; 0 leaves the most probable token alone.
        top_k: how many tokens stay; 0 or None: all.
        top_p: the fewest tokens whose probabilities reach it stay; 1 or None: all.

    Returns:
        `[..., vocab]`, normalised; -inf where a token cannot be drawn.
    """
    if temperature == 0:
        return one_hot_log_probs(logits.argmax(-1), logits)
    logits = (logits / temperature).log_softmax(-1)
    limited = 0 < (top_k or 0) < logits.shape[-1]
    nucleus = top_p is not None and top_p < 1
    if not (limited or nucleus):
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    if limited:
        ordered[..., top_k:] = -torch.inf
    if nucleus:
        probability = ordered.softmax(-1)
        reached_before = probability.cumsum(-1) - probability >= top_p
        reached_before[..., 0] = False
        ordered = ordered.masked_fill(reached_before, -torch.inf)
    return torch.empty_like(logits).scatter(-1, index, ordered).log_softmax(-1)
