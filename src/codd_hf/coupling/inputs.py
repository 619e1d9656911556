"""The tensors of a forward pass, checked once."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..checks.arguments import as_tensor, check_tokens, padding_mask, token_ids

if TYPE_CHECKING:
    from .windows import CoupledBackbone


def checked_inputs(
    model: CoupledBackbone, ids: Any, mask: Any, positions: Any, labels: Any, start: Any
) -> tuple[torch.Tensor, Any, Any, Any, Any]:
    """The tensors of `CoDDModel.forward`, from `input_ids` to `window_start`, on its device.

    Raises:
        ValueError: a shape or a value is out of range.
        TypeError: a tensor is of another kind.
    """
    vocab_size, device, most = model.config.vocab_size, model.device, model.max_positions
    ids = token_ids("input_ids", ids, vocab_size, device)
    if ids.shape[1] == 0:
        raise ValueError("`input_ids` must hold at least one token in a row, got none.")
    if mask is not None:
        mask = padding_mask("attention_mask", mask, ids.shape, device)
    elif (real := model.real_tokens(ids)) is not None and not bool(real[:, [0, -1]].all()):
        warnings.warn(
            "`input_ids` begin or end with the padding token, which is read as text without an "
            "`attention_mask`: give one.",
            stacklevel=3,
        )
    if positions is not None:
        positions = as_tensor("position_ids", positions, int, device=device)
        batch = 1 if positions.shape[:1] == (1,) else len(ids)
        as_tensor("position_ids", positions, shape=(batch, ids.shape[1]))
        if most is not None:
            check_tokens("position_ids", positions, most, "positions")
    if labels is not None:
        labels = as_tensor("labels", labels, int, ids.shape, device)
        check_tokens("labels", labels.masked_fill(labels == -100, 0), vocab_size)
    if start is not None:
        start = as_tensor("window_start", start, int, ids.shape[:1], device)
    return ids, mask, positions, labels, start


def refuse_requests(asked: dict[str, Any]) -> None:
    """Raises a TypeError for arguments of transformers' models that ask for anything."""
    for name in asked.keys() - {"use_cache", "cache_position"}:
        value = asked[name]
        if isinstance(value, torch.Tensor):  # of a tokenizer, `token_type_ids`
            value = bool(value.any())
        if value is not None and not (isinstance(value, int) and value == 0):
            raise TypeError(
                f"`{name}` cannot be used here: leave it out, or give it to `model.backbone`."
            )
