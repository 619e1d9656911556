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

from ..circuits import CoupledCategorical
from ..circuits.random import draw_categorical
from .candidates import CoupledWindows, shape_logits
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
            elsewhere.
    """

    tokens: torch.Tensor
    where: torch.Tensor
    probs: torch.Tensor
    pred_logits: torch.Tensor


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
        settings, batch = self.settings, self.windows.batch
        plain, sharpened, text = self.windows.plain, self.windows.sharpened, self.text
        log_threshold = math.log(settings.threshold) if settings.threshold else -math.inf
        log_joint = self.probs.new_zeros(batch)
        going = torch.ones(batch, dtype=torch.bool, device=count.device)
        drawn = 0
        while True:
            left = self.committable & ~self.where
            going = going & left.any(-1)
            if settings.strategy not in ("threshold", "joint"):
                going = going & (count > drawn)
            if not bool(going.any()):
                return Drawn(self.tokens, self.where, self.probs, self.pred_logits)
            law = self.windows.rows(plain.marginals)
            confidence = law.amax(-1)
            scores = order_scores(settings.strategy, lambda law=law: law, lambda c=confidence: c)
            chosen = scores.masked_fill(~left, -torch.inf).argmax(-1)  # [batch]
            if settings.strategy == "threshold":
                sure = confidence.gather(1, chosen[:, None])[:, 0] >= settings.threshold
                going = going & (sure | (count > drawn))
            rows = going.nonzero()[:, 0]
            columns = chosen[rows]
            before = self.tokens[rows, columns], self.probs[rows, columns]
            before_logits = self.pred_logits[rows, columns]
            self._draw(self._laws_at(sharpened, rows, columns), rows, columns, text)
            self._rate(law[rows, columns], rows, columns)
            if settings.strategy == "joint":
                log_joint[rows] += self.probs[rows, columns].log()
                kept = (log_joint[rows] >= log_threshold) | (count[rows] > drawn)
                dropped = rows[~kept], columns[~kept]
                self.tokens[dropped], self.probs[dropped] = (t[~kept] for t in before)
                self.pred_logits[dropped] = before_logits[~kept]
                going = going.index_put((rows[~kept],), going.new_zeros(()))
                rows, columns = rows[kept], columns[kept]
            new = torch.zeros_like(self.where)
            new[rows, columns] = True
            self.where = self.where | new
            text = text.reveal(self.tokens, new)
            known = self.windows.windows(self.tokens), self.windows.windows(new)
            same = plain is sharpened
            plain = plain.condition(*known)
            sharpened = plain if same else sharpened.condition(*known)
            drawn += 1

    def _laws_at(
        self, distribution: CoupledCategorical, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """`[n, vocab]`: the laws of the tokens at some places of the rows."""
        (length,) = distribution.event_shape
        per_row = len(distribution.present) // self.windows.batch
        return distribution.marginals_at(rows * per_row + columns // length, columns % length)

    def _draw(
        self, laws: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, text: RowText
    ) -> torch.Tensor:
        """Tokens `[n]` from laws `[n, vocab]`, which are written down at their places."""
        settings = self.settings
        scores = self.controls.apply(laws.log(), rows, text)
        shaped = shape_logits(
            scores, settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        self.pred_logits[rows, columns] = shaped
        if self.uniforms is None:
            tokens = shaped.argmax(-1)
        else:
            tokens = draw_categorical(shaped.exp(), self.uniforms[rows, columns])
        self.tokens[rows, columns] = tokens
        return tokens

    def _rate(self, laws: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        tokens = self.tokens[rows, columns]
        self.probs[rows, columns] = laws.gather(-1, tokens[:, None])[:, 0].to(self.probs.dtype)
