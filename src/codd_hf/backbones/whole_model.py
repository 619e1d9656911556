"""Reading a model of which no more is known than transformers' output conventions."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from .family import BackboneStates


def run_whole_model(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> BackboneStates:
    """The logits of all positions, and the last of `hidden_states`, as the model returns them.

    Raises:
        ValueError: `position_ids` are given to a model that does not take them.
    """
    taken = inspect.signature(model.forward).parameters
    kwargs = {"use_cache": False} if "use_cache" in taken else {}
    if position_ids is not None:
        if "position_ids" not in taken:
            raise ValueError(
                f"`position_ids` cannot be given to {type(model).__name__}: leave them out."
            )
        kwargs["position_ids"] = position_ids
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_hidden_states=True,
        return_dict=True,
        **kwargs,
    )
    logits = output.logits
    return BackboneStates(
        output.hidden_states[-1], lambda index: logits if index is None else logits[index]
    )
