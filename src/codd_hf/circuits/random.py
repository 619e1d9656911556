"""Random draws that are reproducible row by row.

With one generator per row, a row's numbers do not depend on the rows that share its batch.
"""

import hashlib
from collections.abc import Sequence

import torch

from ..checks.arguments import generators

Generators = torch.Generator | Sequence[torch.Generator] | None


def uniform(
    shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Uniform float32 numbers in [0, 1) on a device, drawn where the generator lives.

    The shape's first entry counts rows: a list of generators has one for each.
    """
    generators("generator", generator, shape[0])
    if generator is None:
        return torch.rand(*shape, device=device)
    if isinstance(generator, torch.Generator):
        return torch.rand(*shape, generator=generator, device=generator.device).to(device)
    rows = [torch.rand(*shape[1:], generator=g, device=g.device).to(device) for g in generator]
    return torch.stack(rows)


def draw_categorical(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws indices `[...]` by `probabilities` `[..., K]`, up to a factor, and `uniforms` `[...]`.

    None that is zero is drawn, but for the last one, which stands for rows whose sum is zero.
    """
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    cumulative = probabilities.cumsum(-1, dtype=dtype)
    # Below the total even after rounding: a float32 below 1 is so by 2^-24 at least.
    threshold = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, threshold.contiguous(), right=True).squeeze(-1)
    return index.clamp_(max=probabilities.shape[-1] - 1)


def beside_global(device: torch.device, tokens: torch.Tensor | None = None) -> torch.Generator:
    """A generator that leaves the global stream of a device as it is, and yet is told by its state.

    Tokens, where they are drawn from a generator that is not known here, tell it too.
    """
    parts = [torch.get_rng_state()]
    if device.type != "cpu":
        parts.append(torch.get_device_module(device).get_rng_state(device))
    if tokens is not None:
        parts.append(tokens.cpu())
    digest = hashlib.blake2b(digest_size=7)
    for part in parts:
        digest.update(part.numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big"))
