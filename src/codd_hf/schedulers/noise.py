"""Coupled draws for the forward process: spans of tokens that are masked together.

Parallel decoding commits some tokens and leaves holes, which are runs of masked tokens; independent
masks show a model few long runs at low noise levels. Here a row is cut into spans of geometric
length, and every token of a span shares one uniform number `u`; the tokens with `u < t` are masked.
Each token is still masked with probability exactly `t`, at every level and any span length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks.arguments import number
from ..circuits.random import Generators, uniform


def span_uniforms(
    shape: Sequence[int],
    mean_span_length: float = 1.0,
    generator: Generators = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Uniform numbers that the positions of a span share.

    Args:
        shape: `(batch, length)`.
        mean_span_length: expected length of a span that no end of the row cuts; 1 gives every
            position a number of its own, and the same numbers as `uniform` does.
        generator: one generator, a list with one per row, or None for the global one.
        device: where the numbers are wanted.

    Returns:
        `[batch, length]` float32 in [0, 1), each uniform on its own.

    Raises:
        ValueError: `mean_span_length` is below 1.
    """
    number("mean_span_length", mean_span_length, least=1)
    numbers = uniform(shape, generator, device)
    if mean_span_length == 1:
        return numbers
    begins = uniform(shape, generator, device) < 1 / mean_span_length
    position = torch.arange(shape[1], device=numbers.device)
    first = torch.where(begins, position, 0).cummax(1).values
    return numbers.gather(1, first)
