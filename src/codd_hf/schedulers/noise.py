"""The forward process: spans of tokens that are masked together.

Parallel decoding leaves holes, which are runs of masked tokens; independent masks show a model few
long runs at low noise levels. Here a row is cut into spans of geometric length, whose tokens share
one uniform number `u`; the tokens with `u < t` are masked. Each token is still masked with
probability exactly `t`.
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
    """Numbers `[batch, length]` in [0, 1), each uniform, that the positions of a span share.

    A `mean_span_length` of 1 gives every position a number of its own, the same as `uniform`.
    """
    number("mean_span_length", mean_span_length, least=1)
    numbers = uniform(shape, generator, device)
    if mean_span_length == 1:
        return numbers
    begins = uniform(shape, generator, device) < 1 / mean_span_length
    position = torch.arange(shape[1], device=numbers.device)
    first = torch.where(begins, position, 0).cummax(1).values
    return numbers.gather(1, first)
