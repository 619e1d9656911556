"""The decode loop that all baselines share, and how answers are marked.

Decoding fills an answer window by window from the left. A window takes at most `passes` passes of
the backbone, and each commits an even share of the tokens that are still open.
A method is a `Sampler`: it sees one pass of the backbone over one window and says which tokens to
commit. Seconds are this process's processor seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from common import Backbone, Canvas, to_fill

from codd_hf.backbones import BackboneStates
from codd_hf.data.tasks import Task, is_right

BATCH = 50
"""Questions that are answered at once."""


@dataclass
class Pass:
    """One pass of the backbone, seen through one window of each row.

    Attributes:
        backbone: that made it.
        canvas: the rows before the pass.
        columns: `[batch, L]`, the places of the window.
        states: of the pass over `canvas`.
        log_probs: `[batch, L, vocab]`, the backbone's prediction.
        open: `[batch, L]` bool, where a token may be committed.
        count: `[batch]`, how many tokens to commit.
        temperature: of the draw; 0 takes the most probable token.
        generator: of the draw.
    """

    backbone: Backbone
    canvas: Canvas
    columns: torch.Tensor
    states: BackboneStates
    log_probs: torch.Tensor
    open: torch.Tensor
    count: torch.Tensor
    temperature: float = 0.0
    generator: torch.Generator | None = None

    @classmethod
    def over(
        cls, backbone: Backbone, canvas: Canvas, first: torch.Tensor, passes_left: int = 1, **draw
    ) -> Pass:
        """A pass over the windows that begin at `first` `[batch]`."""
        columns = first[:, None] + torch.arange(backbone.window)
        row = torch.arange(len(first))[:, None].expand_as(columns)
        states = backbone.read(canvas)
        log_probs = backbone.log_probs(states.logits((row, columns)))
        open_ = open_positions(backbone, canvas).gather(1, columns)
        count = -(-open_.sum(-1) // passes_left)
        return cls(backbone, canvas, columns, states, log_probs, open_, count, **draw)

    @property
    def tokens(self) -> torch.Tensor:
        """`[batch, L]`, the window before the pass."""
        return self.canvas.tokens.gather(1, self.columns)

    def pick(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[...]` drawn from `[..., vocab]`, and their log-probabilities."""
        scores = log_probs
        if self.temperature > 0:
            uniform = torch.rand(log_probs.shape, generator=self.generator).clamp(min=1e-20)
            scores = log_probs / self.temperature - (-uniform.log()).log()
        tokens = scores.argmax(-1)
        return tokens, log_probs.gather(-1, tokens[..., None])[..., 0]


class Sampler(Protocol):
    """Says what a pass commits."""

    def draw(self, seen: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[batch, L]`, and `[batch, L]` bool, the open positions that get them."""


class Factorized:
    """Each token from its own prediction; the surest ones are committed.

    Args:
        order: which are the surest, those of greatest `confidence`, of greatest `margin` between
            the two most probable tokens, or of least `entropy`.
    """

    def __init__(self, order: str = "confidence") -> None:
        self.order = order

    def draw(self, seen: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Sampler`."""
        tokens, scores = seen.pick(seen.log_probs)
        if self.order == "margin":
            best = seen.log_probs.exp().topk(2, dim=-1).values
            scores = best[..., 0] - best[..., 1]
        elif self.order == "entropy":
            scores = -torch.special.entr(seen.log_probs.exp()).sum(-1)
        return tokens, surest(scores, seen.open, seen.count)


def surest(scores: torch.Tensor, open_: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`[batch, L]` bool: the `count` `[batch]` open positions of the highest scores."""
    order = scores.masked_fill(~open_, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return open_ & (order.argsort(-1) < count[:, None])


def open_positions(backbone: Backbone, canvas: Canvas) -> torch.Tensor:
    """`[batch, length]` bool: masks that no end token of the answer stands before."""
    place = torch.arange(canvas.tokens.shape[1])
    end = (canvas.tokens == backbone.end_id) & (place >= canvas.start[:, None])
    return (canvas.tokens == backbone.mask_id) & (end.cumsum(-1) == 0) & canvas.real


@torch.no_grad()
def decode(
    backbone: Backbone,
    sampler: Sampler,
    canvas: Canvas,
    passes: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Fills canvases from `to_fill`, in place; returns the answers' tokens `[batch, n]`."""
    size = int((canvas.real.sum(-1) - canvas.start)[0])
    for offset in range(0, size, backbone.window):
        first = canvas.start + offset
        for number in range(passes):
            window = first[:, None] + torch.arange(backbone.window)
            rows = open_positions(backbone, canvas).gather(1, window).any(-1).nonzero()[:, 0]
            if not len(rows):
                break
            some = canvas.rows(rows)
            draw = {"temperature": temperature, "generator": generator}
            seen = Pass.over(backbone, some, first[rows], passes - number, **draw)
            tokens, chosen = sampler.draw(seen)
            row, at = chosen.nonzero(as_tuple=True)
            canvas.tokens[rows[row], seen.columns[row, at]] = tokens[row, at]
    return canvas.tokens.gather(1, canvas.start[:, None] + torch.arange(size))


Answering = Callable[[Sequence[str], int], list[str]]
"""Answers questions in a number of passes a window."""


def answering(backbone: Backbone, sampler: Sampler) -> Answering:
    """Answers with a sampler, at temperature 0."""

    def answer(questions: Sequence[str], passes: int) -> list[str]:
        canvas = to_fill(backbone, [backbone.prompt(question) for question in questions])
        return [backbone.text(row) for row in decode(backbone, sampler, canvas, passes)]

    return answer


def marked(answer: Answering, tasks: Sequence[Task], passes: int) -> dict[str, Any]:
    """Of each task, 100 if it is answered rightly and 0 if not; and the mean seconds of one."""
    right, began = [], time.process_time()
    for first in range(0, len(tasks), BATCH):
        some = tasks[first : first + BATCH]
        texts = answer([task.question for task in some], passes)
        right += [100 * is_right(task, text) for task, text in zip(some, texts, strict=True)]
    return {"right": right, "seconds": (time.process_time() - began) / len(tasks)}
