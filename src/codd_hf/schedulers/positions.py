"""Which of the masked positions a step commits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..circuits.random import Generators, uniform
from .candidates import Confidence
from .settings import ADAPTIVE, DrawSettings


def fewest(committable: torch.Tensor, steps_left: int) -> torch.Tensor:
    """`[batch]`: the tokens a step must commit so that an even pace fills everything in time."""
    return (committable.sum(-1) + steps_left - 1) // steps_left


def order_scores(
    strategy: str, law: Callable[[], torch.Tensor], best: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Scores `[batch, length]`; the position with the highest comes first.

    Args:
        strategy: one that ranks by what is known of each position.
        law: gives the probabilities `[batch, length, vocab]`.
        best: gives the probability that counts as confidence, `[batch, length]`.
    """
    if strategy == "margin":
        first, second = law().topk(2, dim=-1).values.unbind(-1)
        return first - second
    if strategy == "entropy":
        return -torch.special.entr(law()).sum(-1)
    return best()


def fixed_scores(
    settings: DrawSettings, like: torch.Tensor, generator: Generators
) -> torch.Tensor | None:
    """Scores `[batch, length]` of strategies that look at no prediction; None for the others.

    At temperature 0 the order of `random` is the same in every row and call.
    """
    if settings.strategy == "random":
        if settings.is_greedy:
            always = torch.Generator().manual_seed(0)
            return uniform(like.shape[1:], always, like.device).expand_as(like)
        return uniform(like.shape, generator, like.device)
    if settings.strategy == "left_to_right":
        return -torch.arange(like.shape[1], device=like.device).expand_as(like).float()
    return None


def first_in_order(
    scores: torch.Tensor, committable: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """`[batch, length]` bool: the `count` `[batch]` best-scored; ties go to the leftmost."""
    return committable & (ranks(scores, committable) < count[:, None])


def ranks(scores: torch.Tensor, committable: torch.Tensor) -> torch.Tensor:
    """`[batch, length]`: each position's place in the order; those not committable come last."""
    scores = scores.masked_fill(~committable, -torch.inf)
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def choose(
    settings: DrawSettings,
    confidence: Confidence,
    tokens: torch.Tensor,
    probs: torch.Tensor,
    committable: torch.Tensor,
    at_least: torch.Tensor,
    generator: Generators,
) -> torch.Tensor:
    """`[batch, length]` bool: the positions whose candidates are committed.

    Args:
        settings: the strategy and its threshold.
        confidence: how sure the model is.
        tokens: `[batch, length]`, the candidates.
        probs: `[batch, length]`, their confidence.
        committable: `[batch, length]` bool, where a token may be committed.
        at_least: `[batch]`, the fewest to commit, if there are so many.
        generator: for `random`.
    """
    scores = fixed_scores(settings, probs, generator)
    if scores is None:
        scores = order_scores(settings.strategy, confidence.law, lambda: probs)
    count = at_least
    if settings.strategy == "threshold":
        sure = (committable & (probs >= settings.threshold)).sum(-1)
        count = torch.maximum(count, sure)
    if settings.strategy == "joint":
        rank = ranks(scores, committable)
        longest = int(committable.sum(-1).max())
        lengths = torch.arange(1, longest + 1, device=rank.device)[:, None, None]
        nested = (rank < lengths) & committable  # [longest, batch, length]
        log_joint = confidence.log_joint(tokens, nested)
        above = log_joint >= (math.log(settings.threshold) if settings.threshold else -math.inf)
        above = above & (lengths[..., 0] <= committable.sum(-1))
        count = torch.maximum(count, above.long().cumprod(0).sum(0))
    return first_in_order(scores, committable, count)


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
        committable: `[batch, length]` bool, where a token may be committed.
        steps_left: steps that remain, this one included.
        generator: for `random`.
    """
    best = log_probs.amax(-1).exp()
    scores = fixed_scores(settings, best, generator)
    if scores is None:
        scores = order_scores(settings.strategy, log_probs.exp, lambda: best)
    selected = first_in_order(scores, committable, fewest(committable, steps_left))
    if settings.strategy in ADAPTIVE:
        selected = selected | (committable & (best >= settings.threshold))
    return selected
