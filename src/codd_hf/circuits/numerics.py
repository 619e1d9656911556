"""Arithmetic with probabilities that may be zero and logarithms that may be -inf."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

LOST_MASS = 1e-12
"""A row is repeated in log space when one rescaled step leaves it less mass than this."""


def full_precision(function: Callable) -> Callable:
    """Switches autocast off inside: products of probabilities are not for half precision.

    The first argument must have a `device`.
    """

    @functools.wraps(function)
    def wrapper(first, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper


def safe_log(x: torch.Tensor) -> torch.Tensor:
    """Logarithm with `log 0 = -inf` and a zero gradient there."""
    positive = x > 0
    return torch.where(positive, x.masked_fill(~positive, 1).log(), -torch.inf)


def shifted_exp(x: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp(x - shift)` and the `shift`, the maximum over `dim` (0 where that is -inf)."""
    shift = x.detach().amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    return (x - shift).exp(), shift


def normalised_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """`softmax` over the last axis that gives zeros, not NaN, where everything is -inf."""
    weights, _ = shifted_exp(log_weights, -1)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total <= 0, 1)


def logsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`logsumexp` whose gradient is zero, not NaN, where everything is -inf."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.logsumexp(dim)  # one fused pass
    weights, shift = shifted_exp(x, dim)
    return safe_log(weights.sum(dim)) + shift.squeeze(dim)
