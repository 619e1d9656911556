"""The loss in the form that trl's trainers ask for: a log-probability of every token.

They put a projection of their own, of next-token predictors, in the place of `forward`, and switch
it on by `fused_lm_head=True`. It would leave the head out and pair every prediction with the token
after its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class PerTokenOutput(ModelOutput):
    """What trl reads of a pass.

    Attributes:
        loss: scalar, as of [`CoDDModel`].
        log_probs: `[batch, length]`, minus the loss at every token with a label, else 0. The law is
            of whole windows; of the tokens only their mean has a meaning.
        entropy: `[batch, length]`, of the factorized predictions, for trl's log.
        is_top1: `[batch, length]`, whether these are right, likewise.
        label_mask: `[batch, length]` bool, the tokens with a label.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def per_token_output(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> PerTokenOutput:
    """One pass with labels.

    Args:
        model: the model.
        input_ids: `[batch, length]`.
        attention_mask: `[batch, length]`, 0 at padding.
        labels: `[batch, length]`, -100 where not supervised.
        **kwargs: further arguments of the model's `forward`.

    Raises:
        ValueError: there are no labels.
    """
    if labels is None:
        raise ValueError("`labels` must be given with `fused_lm_head=True`, got None.")
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        **(kwargs | {"coupling": "none", "return_dict": True}),
    )
    mask = labels != -100
    with torch.no_grad():
        log_probs = output.logits.float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        is_top1 = log_probs.argmax(-1) == labels
    return PerTokenOutput(
        loss=output.loss,
        log_probs=torch.where(mask, -output.loss, 0.0),
        entropy=entropy * mask,
        is_top1=(is_top1 & mask).to(entropy.dtype),
        label_mask=mask,
    )
