r"""Any-order sampling: one token at a time, each from its exact conditional.

Tokens are drawn from `p(x_i | everything known or drawn before)`, by the chain rule a sample of
the joint. The next position is the one that the strategy ranks first given the tokens known by
then; since no ranking looks at a candidate, at temperature 1 the tokens of a step have exactly the
joint's distribution, whatever the order (not so with `joint`, which stops at a candidate).

Strategies that rank beforehand are drawn from left to right in one pass over the chain. The others
run forward and backward once for each token.

Source: section 5.1 of CoDD (arXiv 2603.00045).
"""

from __future__ import annotations

import torch

from ..circuits.distribution.conditionals import draw_left_to_right
from ..circuits.distribution.incremental import IncrementalPosterior
from .draws import Drawn, Step
from .strategies import STRATEGIES, best_scored


def draw_in_any_order(step: Step) -> Drawn:
    """Draws the tokens that the strategy commits, and no others."""
    drawing = AnyOrder(step)
    order = STRATEGIES[step.settings.strategy].order
    if order is None:
        drawing.draw_one_by_one()
    else:
        scores = order(drawing.probs, step.generator, step.settings.is_greedy)
        drawing.draw_at_once(best_scored(scores, step.committable, step.at_least))
    return Drawn(drawing.tokens, drawing.where, drawing.tokens, drawing.probs, drawing.pred_logits)


class AnyOrder:
    """One step of any-order sampling.

    Args:
        step: what it draws from.

    Attributes:
        tokens: `[batch, length]`, those drawn by now committed.
        where: `[batch, length]` bool, where that is.
        probs: `[batch, length]`, their probabilities at evidence temperature 1, each given the
            tokens known when it was drawn; 1 at other known positions, 0 at masked ones.
        pred_logits: `[batch, length, vocab]`, what they were drawn from; one-hot elsewhere.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.plain, self.sharpened = step.windows.plain, step.windows.sharpened
        self.uniforms = step.uniforms()
        self.tokens = step.sample.clone()
        self.where = torch.zeros_like(step.windows.masked)
        self.probs = (~step.windows.masked).to(self.plain.log_partition.dtype)
        self.pred_logits = None
        if step.output_logits:
            shape = (*step.sample.shape, self.plain.potentials.vocab_size)
            self.pred_logits = self.probs.new_full(shape, -torch.inf)
            self.pred_logits.scatter_(-1, step.sample[..., None], 0.0)

    def draw_at_once(self, where: torch.Tensor) -> None:
        """Draws the positions `where` `[batch, length]`, from left to right, in one pass."""
        in_windows = self.step.windows.split(where)
        per_row, length = len(in_windows) // len(where), in_windows.shape[1]
        in_window = torch.arange(where.shape[1], device=where.device) % length

        def draw(i: int, probs: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            rows, columns = window // per_row, window % per_row * length + i
            self.where = where & (in_window < i)
            tokens, logits = self._draw(probs, rows, columns)
            rated = probs.gather(-1, tokens[:, None])[:, 0].to(self.probs.dtype)
            self._write(rows, columns, tokens, rated, logits)
            return tokens

        def rate(i: int, probs: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            rows, columns = window // per_row, window % per_row * length + i
            tokens = self.tokens[rows, columns]
            self.probs[rows, columns] = probs.gather(-1, tokens[:, None])[:, 0].to(self.probs.dtype)
            return tokens

        draw_left_to_right(self.sharpened, in_windows, draw)
        if self.sharpened is not self.plain:
            draw_left_to_right(self.plain, in_windows, rate)
        self.where = where

    def draw_one_by_one(self) -> None:
        """Draws the position that ranks first, learns from it, and goes on."""
        step, settings = self.step, self.step.settings
        strategy = STRATEGIES[settings.strategy]
        distributions = [self.plain]
        if self.sharpened is not self.plain:
            distributions.append(self.sharpened)
        known = IncrementalPosterior(distributions, step.windows.split(step.committable))
        per_row, length = len(known.wanted) // len(self.tokens), known.wanted.shape[1]

        def place(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows * per_row + columns // length, columns % length

        log_joint = self.probs.new_zeros(len(self.tokens))
        confidence, scores = torch.zeros_like(self.probs), torch.zeros_like(self.probs)
        going = torch.ones_like(step.at_least, dtype=torch.bool)
        renewed = left = step.committable
        chosen = torch.zeros_like(step.at_least)
        drawn = 0
        while True:
            due = step.at_least > drawn
            going = going & left.any(-1)
            if strategy.goes_on is None:
                going = going & due
            if not bool(going.any()):
                return
            if drawn:  # only here, since a step's last token says nothing that is asked
                rows = going.nonzero()[:, 0]
                windows, positions = place(rows, chosen[rows])
                known.reveal(windows, positions, self.tokens[rows, chosen[rows]])
                renewed = torch.zeros_like(known.wanted)
                renewed[windows] = True
                renewed = renewed.view_as(left)
            at = (renewed & left & going[:, None]).nonzero(as_tuple=True)
            probs = known.token_probs(0, *place(*at))
            confidence[at] = probs.amax(-1)
            scores[at] = strategy.score(confidence[at], lambda probs=probs: probs)
            chosen = scores.masked_fill(~left, -torch.inf).argmax(-1)  # [batch]
            if strategy.goes_on == "each":
                sure = confidence.gather(1, chosen[:, None])[:, 0] >= settings.threshold
                going = going & (sure | due)
                if not bool(going.any()):
                    return
            rows = going.nonzero()[:, 0]
            columns = chosen[rows]
            probs = known.token_probs(len(distributions) - 1, *place(rows, columns))
            tokens, logits = self._draw(probs, rows, columns)
            rated = known.prob_of(tokens, 0, *place(rows, columns))
            if strategy.goes_on == "together":
                log_joint[rows] += rated.log()
                stays = (log_joint[rows] >= settings.log_threshold) | due[rows]
                going = going.index_put((rows[~stays],), going.new_zeros(()))
                rows, columns, tokens, rated = (t[stays] for t in (rows, columns, tokens, rated))
                logits = None if logits is None else logits[stays]
            self._write(rows, columns, tokens, rated, logits)
            left = left & ~self.where
            drawn += 1

    def _draw(
        self, probs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens `[n]` from probabilities `[n, vocab]`, and the logits they were drawn from."""
        scores = probs.log()
        if self.step.text is not None:
            text = self.step.text.reveal(self.tokens, self.where)
            scores = self.step.control(scores, rows, text)
        uniforms = None if self.uniforms is None else self.uniforms[rows, columns]
        return self.step.draw(scores, uniforms, rows)

    def _write(self, rows, columns, tokens, probs, logits) -> None:
        self.tokens[rows, columns], self.probs[rows, columns] = tokens, probs
        self.where[rows, columns] = True
        if logits is not None and self.pred_logits is not None:
            self.pred_logits[rows, columns] = logits
