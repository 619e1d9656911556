"""Which of the masked positions a step commits: those that rank highest.

An adaptive strategy goes on down the ranking while it is sure. Ties go to the leftmost position.
A strategy is a case of `rank`, and a name in the annotation of `DrawSettings.strategy`.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..circuits import Generators, uniform
from .settings import DrawSettings

ADAPTIVE = ("threshold", "joint")
"""Strategies that commit as many tokens as are sure enough."""
IN_ORDER = ("random", "left_to_right")
"""Strategies that rank positions before anything is predicted."""


def fewest(
    settings: DrawSettings, committable: torch.Tensor, steps_left: int | torch.Tensor
) -> torch.Tensor:
    """`[batch]`: the tokens a step must commit so that all positions are filled in time.

    An equal share in each step; `joint`, which goes further wherever it is sure, begins slowly,
    with shares of 1, 2, 3, ..., since what is committed early for want of time is guessed.
    """
    shares = steps_left * (steps_left + 1) // 2 if settings.strategy == "joint" else steps_left
    return (committable.sum(-1) + shares - 1) // shares


def kept_pace(keepable: torch.Tensor, steps_done: int | torch.Tensor, num_steps: Any) -> Any:
    """`[batch]`: the tokens that the last of `steps_done` of `num_steps` steps must keep.

    Where what is not kept is noise again, each step decides all positions anew.
    """
    return (keepable.sum(-1) * steps_done + num_steps - 1) // num_steps


def rank(
    settings: DrawSettings,
    confidence: torch.Tensor,
    probs: Callable[[], torch.Tensor],
    generator: Generators = None,
) -> torch.Tensor:
    """Scores of positions `[..., n]`: the higher, the sooner one is committed.

    Args:
        settings: the strategy.
        confidence: `[..., n]`, the probability of each candidate.
        probs: gives the probabilities of all tokens, `[..., n, vocab]`.
        generator: for a random order; at temperature 0 it is the same in every row and call.
    """
    match settings.strategy:
        case "margin":  # by how much the best token leads
            first, second = probs().topk(2, dim=-1).values.unbind(-1)
            return first - second
        case "entropy":
            return -torch.special.entr(probs()).sum(-1)
        case "random" if settings.temperature == 0:
            always = torch.Generator().manual_seed(0)
            return uniform(confidence.shape[1:], always, confidence.device).expand_as(confidence)
        case "random":
            return uniform(confidence.shape, generator, confidence.device)
        case "left_to_right":
            return leftmost_first(confidence)
    return confidence


def leftmost_first(like: torch.Tensor) -> torch.Tensor:
    """Scores like a tensor `[batch, length]`, by which the leftmost position ranks first."""
    return -torch.arange(like.shape[1], device=like.device).expand_as(like).float()


def choose(
    settings: DrawSettings,
    confidence: torch.Tensor,
    probs: Callable[[], torch.Tensor],
    committable: torch.Tensor,
    at_least: torch.Tensor,
    generator: Generators,
    log_prob: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`[batch, length]` bool: the positions whose candidates are committed.

    Args:
        settings: the strategy and its threshold.
        confidence: `[batch, length]`, as for `rank`.
        probs: as for `rank`.
        committable: `[batch, length]` bool.
        at_least: `[batch]`, the fewest to commit, if there are so many.
        generator: as for `rank`.
        log_prob: gives the joint log-probability `[n, batch]` of the candidates at each set of
            positions `[n, batch, length]`, for `joint`; without it, each is judged by itself.
    """
    scores = rank(settings, confidence, probs, generator)
    if settings.strategy == "joint" and log_prob is not None:
        # A larger set is never surer than one that it contains, so that halving finds the largest
        # between two bounds: none is surer than its least sure token, nor less sure than what the
        # doubts about its tokens, added up, leave.
        doubt = (1 - confidence).masked_fill(~committable, torch.inf).sort(-1).values
        at_least = torch.maximum(at_least, (doubt.cumsum(-1) <= 1 - settings.threshold).sum(-1))
        at_least = torch.minimum(at_least, committable.sum(-1))
        most = torch.maximum(at_least, (doubt <= 1 - settings.threshold).sum(-1))
        while (at_least < most).any():
            size = (at_least + most + 1) // 2
            is_sure = log_prob(best_scored(scores, committable, size)[None])[0]
            is_sure = is_sure.exp() >= settings.threshold
            at_least = torch.where(is_sure, torch.maximum(at_least, size), at_least)
            most = torch.where(is_sure, most, torch.minimum(most, size - 1)).maximum(at_least)
    elif settings.strategy in ADAPTIVE:
        sure = (committable & (confidence >= settings.threshold)).sum(-1)
        at_least = torch.maximum(at_least, sure)
    return best_scored(scores, committable, at_least)


def best_scored(
    scores: torch.Tensor, committable: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """`[*S, batch, length]` bool: the `count` `[*S, batch]` best-scored committable positions."""
    scores = scores.masked_fill(~committable, -torch.inf)
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return committable & (ranks < count[..., None])
