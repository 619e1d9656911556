"""Arithmetic with probabilities that may be zero and logarithms that may be -inf."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

LOST_MASS = 1e-12
"""A row is repeated in log space when one rescaled step leaves it less mass than this."""

LOG2_E = math.log2(math.e)


def full_precision(function: Callable) -> Callable:
    """Switches autocast off inside: products of probabilities are not for half precision.

    The first argument must have a `device`.
    """

    @functools.wraps(function)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper


def exp_of_difference(
    x: torch.Tensor, shift: torch.Tensor, out: torch.Tensor | None = None, factor: float = 1.0
) -> torch.Tensor:
    """`exp(factor x - shift)`, of a finite shift; three times as fast as `exp` on a CPU."""
    return torch.add(-LOG2_E * shift, x, alpha=factor * LOG2_E, out=out).exp2_()


def safe_log(x: torch.Tensor) -> torch.Tensor:
    """Logarithm with `log 0 = -inf` and a zero gradient there."""
    positive = x > 0
    return torch.where(positive, x.masked_fill(~positive, 1).log(), -torch.inf)


def shifted_exp(x: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp(x - shift)` and the `shift`, the maximum over `dim` (0 where that is -inf)."""
    shift = x.detach().amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    difference = x - shift
    in_place = not (torch.is_grad_enabled() and x.requires_grad)
    return difference.exp_() if in_place else difference.exp(), shift


def normalised_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """`softmax` over the last axis that gives zeros, not NaN, where everything is -inf."""
    weights, _ = shifted_exp(log_weights, -1)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total <= 0, 1)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """`log_softmax` over the last axis; a row that is -inf throughout stays so, not NaN."""
    impossible = x.detach().amax(-1, keepdim=True) == -torch.inf
    if not bool(impossible.any()):
        return x.log_softmax(-1)
    return x.masked_fill(impossible, 0).log_softmax(-1).masked_fill(impossible, -torch.inf)


def logsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`logsumexp` whose gradient is zero, not NaN, where everything is -inf."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.logsumexp(dim)  # one fused pass
    weights, shift = shifted_exp(x, dim)
    return safe_log(weights.sum(dim)) + shift.squeeze(dim)


def one_hot_log_probs(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[..., V]`, as `like`, of nothing but the tokens `[...]`."""
    return torch.full_like(like, -torch.inf).scatter_(-1, tokens[..., None], 0.0)


def pin_tokens(where: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[..., V]` that are sure of `tokens` `[...]` where `where` `[...]` says so.

    They are changed in place unless they have a gradient.
    """
    if torch.is_grad_enabled() and log_probs.requires_grad:
        return torch.where(where[..., None], one_hot_log_probs(tokens, log_probs), log_probs)
    at = where.nonzero(as_tuple=True)
    log_probs[at] = -torch.inf
    log_probs[(*at, tokens[at])] = 0.0
    return log_probs
