"""The loss in the form that trl's trainers ask for: a log-probability of every token.

They put a projection of their own, of next-token predictors, in the place of `forward`, and switch
it on by `fused_lm_head=True`. It would leave the head out and pair every prediction with the token
after its own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class PerTokenOutput(ModelOutput):
    """The fields that trl reads, `[batch, length]` but for the loss; zero without a label.

    Attributes:
        loss: scalar, as of [`CoDDModel`].
        log_probs: minus the loss at every token with a label: its distribution is of whole windows,
            so that only the mean of the tokens' has a meaning.
        entropy: of the factorized predictions.
        is_top1: whether these are right.
        label_mask: bool, the tokens with a label.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def per_token_output(model: PreTrainedModel, *args: Any, **kwargs: Any) -> PerTokenOutput:
    """One pass with labels; the arguments are those of the model's `forward`."""
    labels = kwargs.get("labels")
    if labels is None:
        raise ValueError("`labels` must be given with `fused_lm_head=True`, got None.")
    output = model(*args, **(kwargs | {"coupling": "none", "return_dict": True}))
    mask = labels != -100
    with torch.no_grad():
        log_probs = output.logits.float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        is_top1 = (log_probs.argmax(-1) == labels) & mask
    log_prob = torch.where(mask, -output.loss, 0.0)
    return PerTokenOutput(output.loss, log_prob, entropy * mask, is_top1.to(entropy.dtype), mask)
