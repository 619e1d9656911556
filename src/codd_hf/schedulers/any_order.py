r"""Any-order sampling: one token at a time, each from its exact conditional.

Tokens are drawn from `p(x_i | everything known or drawn before)`, by the chain rule a sample of
the joint. The next position is the one that the strategy ranks first given what is known by then;
since no ranking looks at a candidate, at temperature 1 the tokens of a step have exactly the law
that the joint gives them, whatever the order (not so with `joint`, which stops at a candidate).

`random` and `left_to_right` know a step's positions beforehand, and draw them from left to right
in one pass over the chain. The others run forward and backward once for each token.

Source: section 5.1 of CoDD (arXiv 2603.00045).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..circuits.distribution.incremental import Revealing
from .candidates import CoupledWindows, draw_tokens
from .controls import Controls, RowText
from .positions import first_in_order, order_scores
from .settings import DrawSettings


class Drawn(NamedTuple):
    """What was drawn in one step.

    Attributes:
        tokens: `[batch, length]`, with the step's tokens committed.
        where: `[batch, length]` bool, where that is.
        probs: `[batch, length]`, their probabilities at evidence temperature 1, each given what was
            known when it was drawn; 1 at other known positions, 0 at those that stay masked.
        pred_logits: `[batch, length, vocab]`, what they were drawn from; sure of the present token
            elsewhere. None if nobody asked.
    """

    tokens: torch.Tensor
    where: torch.Tensor
    probs: torch.Tensor
    pred_logits: torch.Tensor | None


class AnyOrder:
    """One step of any-order sampling.

    Args:
        windows: the distribution.
        sample: `[batch, length]`, the tokens before the step.
        settings: what shapes the draw.
        committable: `[batch, length]` bool, where a token may be committed.
        uniforms: `[batch, length]` numbers in [0, 1), one for each position; None at temperature 0.
        controls: what else shapes the draw.
        text: the rows before the step.
        output_logits: whether `pred_logits` is wanted.
    """

    def __init__(
        self,
        windows: CoupledWindows,
        sample: torch.Tensor,
        settings: DrawSettings,
        committable: torch.Tensor,
        uniforms: torch.Tensor | None,
        controls: Controls,
        text: RowText,
        output_logits: bool = True,
    ) -> None:
        self.windows = windows
        self.settings = settings
        self.committable = committable
        self.uniforms = uniforms
        self.controls = controls
        self.text = text
        self.tokens = sample.clone()
        self.where = torch.zeros_like(windows.masked)
        self.probs = (~windows.masked).to(windows.plain.log_partition.dtype)
        self.pred_logits = None
        if output_logits:
            vocab_size = windows.plain.potentials.vocab_size
            self.pred_logits = self.probs.new_full((*sample.shape, vocab_size), -torch.inf)
            self.pred_logits.scatter_(-1, sample[..., None], 0.0)

    def draw_at_once(self, scores: torch.Tensor, count: torch.Tensor) -> Drawn:
        """Draws the best-scored positions, from left to right, in one pass over the chain.

        Args:
            scores: `[batch, length]`.
            count: `[batch]`, how many to draw.
        """
        where = first_in_order(scores, self.committable, count)
        in_windows = self.windows.windows(where)
        same = self.windows.sharpened is self.windows.plain
        per_row = len(in_windows) // self.windows.batch
        length = in_windows.shape[1]
        in_window = torch.arange(where.shape[1], device=where.device) % length

        def place(i: int, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return window // per_row, window % per_row * length + i

        def draw(i: int, laws: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            rows, columns = place(i, window)
            text = self.text
            if not self.controls.change_nothing:
                text = text.reveal(self.tokens, where & (in_window < i))
            tokens = self._draw(laws, rows, columns, text)
            if same:
                self._rate(laws, rows, columns)
            return tokens

        def rate(i: int, laws: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
            rows, columns = place(i, window)
            self._rate(laws, rows, columns)
            return self.tokens[rows, columns]

        self.windows.sharpened.draw_left_to_right(in_windows, draw)
        if not same:
            self.windows.plain.draw_left_to_right(in_windows, rate)
        return Drawn(self.tokens, where, self.probs, self.pred_logits)

    def draw_one_by_one(self, count: torch.Tensor) -> Drawn:
        """Draws the position that ranks first, learns from it, and goes on.

        Args:
            count: `[batch]`, the fewest to draw, if there are so many.
        """
        settings = self.settings
        plain, sharpened = self.windows.plain, self.windows.sharpened
        distributions = [plain] if plain is sharpened else [plain, sharpened]
        known = Revealing(distributions, self.windows.windows(self.committable))
        per_row, length = len(known.wanted) // self.windows.batch, known.wanted.shape[1]

        def place(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows * per_row + columns // length, columns % length

        log_threshold = math.log(settings.threshold) if settings.threshold else -math.inf
        log_joint = self.probs.new_zeros(len(count))
        confidence, scores = torch.zeros_like(self.probs), torch.zeros_like(self.probs)
        going = torch.ones_like(count, dtype=torch.bool)
        renewed = left = self.committable
        chosen = torch.zeros_like(count)
        drawn = 0
        while True:
            going = going & left.any(-1)
            if settings.strategy not in ("threshold", "joint"):
                going = going & (count > drawn)
            if not bool(going.any()):
                break
            if drawn:  # only here, since a step's last token says nothing that is asked
                rows = going.nonzero()[:, 0]
                windows, positions = place(rows, chosen[rows])
                known.reveal(windows, positions, self.tokens[rows, chosen[rows]])
                renewed = torch.zeros_like(known.wanted)
                renewed[windows] = True
                renewed = renewed.view_as(left)
            at = (renewed & left & going[:, None]).nonzero(as_tuple=True)
            law = known.laws(0, *place(*at))
            confidence[at] = best = law.amax(-1)
            scores[at] = order_scores(settings.strategy, lambda law=law: law, lambda b=best: b)
            chosen = scores.masked_fill(~left, -torch.inf).argmax(-1)  # [batch]
            if settings.strategy == "threshold":
                sure = confidence.gather(1, chosen[:, None])[:, 0] >= settings.threshold
                going = going & (sure | (count > drawn))
                if not bool(going.any()):
                    break
            rows = going.nonzero()[:, 0]
            columns = chosen[rows]
            before = self.tokens[rows, columns], self.probs[rows, columns]
            before_logits = None if self.pred_logits is None else self.pred_logits[rows, columns]
            text = self.text
            if not self.controls.change_nothing:
                text = text.reveal(self.tokens, self.where)
            laws = known.laws(len(distributions) - 1, *place(rows, columns))
            tokens = self._draw(laws, rows, columns, text)
            self.probs[rows, columns] = known.probs(0, *place(rows, columns), tokens)
            if settings.strategy == "joint":
                log_joint[rows] += self.probs[rows, columns].log()
                kept = (log_joint[rows] >= log_threshold) | (count[rows] > drawn)
                dropped = rows[~kept], columns[~kept]
                self.tokens[dropped], self.probs[dropped] = (t[~kept] for t in before)
                if before_logits is not None:
                    self.pred_logits[dropped] = before_logits[~kept]
                going = going.index_put((rows[~kept],), going.new_zeros(()))
                rows, columns = rows[kept], columns[kept]
            self.where[rows, columns] = True
            left = left & ~self.where
            drawn += 1
        return Drawn(self.tokens, self.where, self.probs, self.pred_logits)

    def _draw(
        self, laws: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, text: RowText
    ) -> torch.Tensor:
        """Tokens `[n]` from laws `[n, vocab]`, which are written down at their places."""
        scores = self.controls.apply(laws.log(), rows, text)
        uniforms = None if self.uniforms is None else self.uniforms[rows, columns]
        tokens, shaped = draw_tokens(
            scores, self.settings, uniforms, rows, output_logits=self.pred_logits is not None
        )
        if shaped is not None and self.pred_logits is not None:
            self.pred_logits[rows, columns] = shaped
        self.tokens[rows, columns] = tokens
        return tokens

    def _rate(self, laws: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        tokens = self.tokens[rows, columns]
        self.probs[rows, columns] = laws.gather(-1, tokens[:, None])[:, 0].to(self.probs.dtype)
