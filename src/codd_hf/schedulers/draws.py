r"""The two ways to draw a step's tokens: independently of each other, or one by one in any order.

In any order a token is drawn from `p(x_i | everything known or drawn before)`, by the chain rule a
sample of the joint. The next position is the one that the strategy ranks first given the tokens
known by then; since no ranking looks at a candidate, at temperature 1 the tokens of a step have
exactly the joint's distribution, whatever the order (not so with `joint`, which stops at a
candidate). Strategies that rank beforehand are drawn from left to right in one pass over the chain.
The others run forward and backward once for each token.

Source: section 5.1 of CoDD (arXiv 2603.00045).
"""

from __future__ import annotations

from functools import partial

import torch

from ..circuits import CoupledCategorical
from ..circuits.distribution.conditionals import draw_left_to_right
from ..circuits.distribution.incremental import IncrementalPosterior
from .drawing import Drawing
from .scheduler_output import CoDDSchedulerOutput
from .strategies import STRATEGIES, best_scored, choose


def draw_independently(
    drawing: Drawing, committable: torch.Tensor, at_least: torch.Tensor
) -> CoDDSchedulerOutput:
    """Draws a candidate for every masked position; the strategy chooses among them.

    Args:
        drawing: of the step.
        committable: `[batch, length]` bool, where a token may be committed.
        at_least: `[batch]`, the fewest tokens to commit, if there are so many.
    """
    sample, masked = drawing.sample, drawing.masked
    scores = drawing.candidate_scores()
    if drawing.processors:
        at = masked.nonzero(as_tuple=True)
        scores = scores.index_put(at, drawing.controlled(scores[at], at[0], drawing.text))
    rows = torch.arange(len(sample), device=sample.device)[:, None].expand_as(sample)
    tokens, logits = drawing.draw(scores, drawing.uniforms(), rows, committable)
    candidates = torch.where(masked, tokens, sample)
    probs = drawing.probs_of(candidates)
    where = choose(drawing, candidates, probs, committable, at_least)
    return drawing.output(torch.where(where, candidates, sample), where, candidates, probs, logits)


def draw_in_any_order(
    drawing: Drawing, committable: torch.Tensor, at_least: torch.Tensor
) -> CoDDSchedulerOutput:
    """Draws the tokens that the strategy commits, and no others.

    Candidates of other masked positions are the mask token, of probability 0; the probabilities of
    drawn tokens are given the tokens known when they were drawn.
    """
    order = STRATEGIES[drawing.settings.strategy].order
    draw = _AnyOrder(drawing)
    if order is None:
        draw.one_by_one(committable, at_least)
    else:
        scores = order(draw.probs, drawing.generator, drawing.settings.is_greedy)
        draw.left_to_right(best_scored(scores, committable, at_least))
    return drawing.output(draw.tokens, draw.where, draw.tokens, draw.probs, draw.logits)


class _AnyOrder:
    """The tokens of a step while they are drawn.

    `tokens`, `probs` and `logits` are those of the output; `where` are the positions drawn by now.
    """

    def __init__(self, drawing: Drawing) -> None:
        self.drawing, self.plain, self.sharpened = drawing, drawing.plain, drawing.sharpened
        self.uniforms, self.tokens = drawing.uniforms(), drawing.sample.clone()
        self.where, self.logits = torch.zeros_like(drawing.masked), None
        self.probs = (~drawing.masked).to(self.plain.log_partition.dtype)
        if drawing.output_logits:
            shape = (*self.tokens.shape, self.plain.potentials.vocab_size)
            self.logits = self.probs.new_full(shape, -torch.inf)
            self.logits.scatter_(-1, self.tokens[..., None], 0.0)

    def left_to_right(self, where: torch.Tensor) -> None:
        """Draws the positions `where` `[batch, length]` in one pass."""
        length, window_length = where.shape[1], self.plain.event_shape[0]
        in_window = torch.arange(length, device=where.device) % window_length

        def visit(distribution: CoupledCategorical, i: int, probs: torch.Tensor, windows):
            place = windows * window_length + i
            at = place // length, place % length
            if distribution is self.sharpened:
                self.where = where & (in_window < i)
                self._commit(*self._draw(probs, *at), at)
            self.probs[at] = _of(probs, self.tokens[at]).to(self.probs.dtype)
            return self.tokens[at]

        for distribution in dict.fromkeys((self.sharpened, self.plain)):
            in_windows = self.drawing.split(where)
            draw_left_to_right(distribution, in_windows, partial(visit, distribution))
        self.where = where

    def one_by_one(self, committable: torch.Tensor, at_least: torch.Tensor) -> None:
        """Draws the position that ranks first, learns from it, and goes on."""
        settings, window_length = self.drawing.settings, self.plain.event_shape[0]
        strategy = STRATEGIES[settings.strategy]
        distributions = list(dict.fromkeys((self.plain, self.sharpened)))
        known = IncrementalPosterior(distributions, self.drawing.split(committable))

        def place(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flat = rows * committable.shape[1] + columns
            return flat // window_length, flat % window_length

        log_joint = self.probs.new_zeros(len(at_least))
        confidence, scores = torch.zeros_like(self.probs), torch.zeros_like(self.probs)
        going, chosen = torch.ones_like(at_least, dtype=torch.bool), torch.zeros_like(at_least)
        renewed = left = committable
        for drawn in range(committable.shape[1] + 1):
            due = at_least > drawn
            going = going & left.any(-1) & (due | (strategy.goes_on is not None))
            rows = going.nonzero()[:, 0]
            if drawn and len(rows):  # only here: a step's last token says nothing that is asked
                windows, positions = place(rows, chosen[rows])
                known.reveal((windows, positions), self.tokens[rows, chosen[rows]])
                renewed = torch.zeros_like(known.wanted)
                renewed[windows] = True
                renewed = renewed.view_as(left)
            at = (renewed & left & going[:, None]).nonzero(as_tuple=True)
            if len(at[0]):
                probs = known.token_probs(0, place(*at))
                confidence[at] = probs.amax(-1)
                scores[at] = strategy.score(confidence[at], lambda probs=probs: probs)
            chosen = scores.masked_fill(~left, -torch.inf).argmax(-1)  # [batch]
            if strategy.goes_on == "each":
                going = going & (due | (_of(confidence, chosen) >= settings.threshold))
            rows = going.nonzero()[:, 0]
            if not len(rows):
                return
            at = rows, chosen[rows]
            sharpened = known.token_probs(len(distributions) - 1, place(*at))
            tokens, logits = self._draw(sharpened, *at)
            probs = known.prob_of(tokens, 0, place(*at))
            if strategy.goes_on == "together":
                log_joint[rows] += probs.log()
                stays = due[rows] | (log_joint[rows] >= settings.log_threshold)
                going[rows[~stays]] = False
                at, tokens, probs = (at[0][stays], at[1][stays]), tokens[stays], probs[stays]
                logits = None if logits is None else logits[stays]
            self._commit(tokens, logits, at)
            self.probs[at] = probs
            left = left & ~self.where

    def _draw(
        self, probs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens `[n]` from probabilities `[n, vocab]`, and the logits they were drawn from."""
        scores = probs.log()
        if self.drawing.processors:
            text = self.drawing.text.reveal(self.tokens, self.where)
            scores = self.drawing.controlled(scores, rows, text)
        uniforms = None if self.uniforms is None else self.uniforms[rows, columns]
        return self.drawing.draw(scores, uniforms, rows)

    def _commit(
        self, tokens: torch.Tensor, logits: torch.Tensor | None, at: tuple[torch.Tensor, ...]
    ) -> None:
        self.tokens[at], self.where[at] = tokens, True
        if self.logits is not None:
            self.logits[at] = logits


def _of(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, index[..., None])[..., 0]
