"""What the arguments of a coupled distribution must be; each error names the argument."""

from __future__ import annotations

import torch

from ...checks.arguments import FACTORS, as_tensor, is_factor, number, shown
from ..context.maps import Context
from ..evidence.dense import DenseEvidence
from ..evidence.lists import TopKEvidence
from ..potentials import Potentials


def check_shapes(
    logits, potentials, tokens, observed, present, context, active, temperature, forbidden
):
    """Raises unless the arguments of `CoupledCategorical` are what they must be and fit together.

    Raises:
        TypeError: one of them is of another kind.
        ValueError: shapes do not fit, or the temperature is out of range.
    """
    if not isinstance(potentials, Potentials):
        raise TypeError(f"`potentials` must be Potentials, got {shown(potentials)}.")
    if isinstance(logits, torch.Tensor):
        as_tensor("logits", logits, float)
    elif not isinstance(logits, DenseEvidence | TopKEvidence):
        raise TypeError(f"`logits` must be a tensor or evidence, got {shown(logits)}.")
    if not isinstance(context, Context | torch.Tensor | None):
        raise TypeError(f"`context` must be a Context or a tensor, got {shown(context)}.")
    if isinstance(context, torch.Tensor):
        as_tensor("context", context, float)
    for name, value in (
        ("observed", observed),
        ("present", present),
        ("active", active),
        ("forbidden", forbidden),
    ):
        if value is not None and not (
            isinstance(value, torch.Tensor) and value.dtype == torch.bool
        ):
            raise TypeError(f"`{name}` must be a bool tensor, got {shown(value)}.")
    number("temperature", temperature, f"above 0, {FACTORS}", is_factor)
    shape = (
        (*logits.batch_shape, potentials.vocab_size)
        if isinstance(logits, TopKEvidence)
        else tuple((logits if isinstance(logits, torch.Tensor) else logits.log_probs).shape)
    )
    if len(shape) != 3 or shape[-1] != potentials.vocab_size:
        raise ValueError(
            f"`logits` must have shape [batch, length, {potentials.vocab_size}], got {shape}."
        )
    batch, length, _ = shape
    for name, held, steps in (
        ("transition", potentials.transition.num_steps, length - 1),
        ("emission", potentials.emission.num_positions, length),
    ):
        if held != 1 and held < steps:
            raise ValueError(
                f"`logits` cover {length} positions, but the circuit's untied {name} has {held}."
            )
    if isinstance(context, torch.Tensor):
        context = Context(context)
    latent = None if context is None else context.latent
    expected = {
        "tokens": (tokens, (batch, length)),
        "observed": (observed, (batch, length)),
        "present": (present, (batch, length)),
        "context": (latent, (batch, length, potentials.num_latents)),
        "active": (active, (batch,)),
        "forbidden": (forbidden, (potentials.vocab_size,)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}.")
    if observed is not None and tokens is None and bool(observed.any()):
        raise ValueError("`tokens` must be given where `observed` is True.")
