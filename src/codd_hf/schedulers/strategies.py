"""Which of the masked positions a step commits.

With `k` steps left and `m` masked positions a step commits the `ceil(m / k)` that rank highest, so
that the last step commits everything; an adaptive strategy goes on down the ranking while it is
sure. Ties go to the leftmost position.

A strategy is a function that scores positions, an entry of `STRATEGIES`, and a name among those of
`DrawSettings.strategy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..circuits.random import Generators, uniform

if TYPE_CHECKING:
    from .drawing import Drawing
    from .settings import DrawSettings

Probs = Callable[[], torch.Tensor]
"""Gives the probabilities `[..., vocab]` of all tokens."""


class Strategy(NamedTuple):
    """How positions are ranked, and how far down the ranking a step goes.

    Attributes:
        score: scores `[...]` by the confidence `[...]` and the probabilities of all tokens.
        order: scores `[batch, length]` before anything is predicted, like a tensor of that shape;
            a strategy has either this or `score`.
        goes_on: while `each` token reaches the threshold, while they reach it `together`, or not.
    """

    score: Callable[[torch.Tensor, Probs], torch.Tensor] | None = None
    order: Callable[[torch.Tensor, Generators, bool], torch.Tensor] | None = None
    goes_on: str | None = None


def confidence(confidence: torch.Tensor, probs: Probs) -> torch.Tensor:
    """The probability of the candidate."""
    return confidence


def margin(confidence: torch.Tensor, probs: Probs) -> torch.Tensor:
    """By how much the best token leads."""
    first, second = probs().topk(2, dim=-1).values.unbind(-1)
    return first - second


def certainty(confidence: torch.Tensor, probs: Probs) -> torch.Tensor:
    """The negative entropy."""
    return -torch.special.entr(probs()).sum(-1)


def at_random(like: torch.Tensor, generator: Generators, greedy: bool) -> torch.Tensor:
    """A random order; at temperature 0 the same in every row and call."""
    if greedy:
        always = torch.Generator().manual_seed(0)
        return uniform(like.shape[1:], always, like.device).expand_as(like)
    return uniform(like.shape, generator, like.device)


def left_to_right(like: torch.Tensor, generator: Generators, greedy: bool) -> torch.Tensor:
    """The leftmost first."""
    return -torch.arange(like.shape[1], device=like.device).expand_as(like).float()


STRATEGIES = {
    "low_confidence": Strategy(confidence),
    "margin": Strategy(margin),
    "entropy": Strategy(certainty),
    "random": Strategy(order=at_random),
    "left_to_right": Strategy(order=left_to_right),
    "threshold": Strategy(confidence, goes_on="each"),
    "joint": Strategy(confidence, goes_on="together"),
}
ADAPTIVE = tuple(name for name, strategy in STRATEGIES.items() if strategy.goes_on)
"""Strategies that commit as many tokens as are sure enough."""


def even_pace(committable: torch.Tensor, steps_left: int) -> torch.Tensor:
    """`[batch]`: the tokens a step must commit so that all positions are filled in time."""
    return (committable.sum(-1) + steps_left - 1) // steps_left


def choose(
    drawing: Drawing,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    committable: torch.Tensor,
    at_least: torch.Tensor,
) -> torch.Tensor:
    """`[batch, length]` bool: the positions whose candidates are committed.

    Args:
        drawing: of the step.
        tokens: `[batch, length]`, the candidates.
        confidence: `[batch, length]`, in them.
        committable: `[batch, length]` bool.
        at_least: `[batch]`, the fewest to commit, if there are so many.
    """
    settings = drawing.settings
    goes_on = STRATEGIES[settings.strategy].goes_on
    scores = _scores(settings, confidence, drawing.probs, drawing.generator)
    if goes_on == "each":
        sure = (committable & (confidence >= settings.threshold)).sum(-1)
        at_least = torch.maximum(at_least, sure)
    if goes_on == "together":
        longest = int(committable.sum(-1).max())
        lengths = torch.arange(1, longest + 1, device=scores.device)[:, None]
        nested = best_scored(scores, committable, lengths)  # [longest, batch, length]
        sure = drawing.log_prob(tokens, nested) >= settings.log_threshold
        sure = sure & (lengths <= committable.sum(-1))
        at_least = torch.maximum(at_least, sure.long().cumprod(0).sum(0))
    return best_scored(scores, committable, at_least)


def select(
    settings: DrawSettings,
    log_probs: torch.Tensor,
    committable: torch.Tensor,
    steps_left: int,
    generator: Generators,
) -> torch.Tensor:
    """`[batch, length]` bool: the positions that a prediction is surest of, at an even pace.

    With an adaptive strategy, also all others whose best token reaches the threshold.

    Args:
        settings: the strategy and its threshold.
        log_probs: `[batch, length, vocab]`, of independent tokens.
        committable: `[batch, length]` bool.
        steps_left: steps that remain, this one included.
        generator: for `random`.
    """
    best = log_probs.amax(-1).exp()
    scores = _scores(settings, best, log_probs.exp, generator)
    selected = best_scored(scores, committable, even_pace(committable, steps_left))
    if settings.strategy in ADAPTIVE:
        selected = selected | (committable & (best >= settings.threshold))
    return selected


def best_scored(
    scores: torch.Tensor, committable: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """`[*S, batch, length]` bool: the `count` `[*S, batch]` best-scored committable positions."""
    scores = scores.masked_fill(~committable, -torch.inf)
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return committable & (ranks < count[..., None])


def _scores(
    settings: DrawSettings, confidence: torch.Tensor, probs: Probs, generator: Generators
) -> torch.Tensor:
    strategy = STRATEGIES[settings.strategy]
    if strategy.order is not None:
        return strategy.order(confidence, generator, settings.is_greedy)
    return strategy.score(confidence, probs)
