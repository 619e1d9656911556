"""The output of a denoising step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class CoDDSchedulerOutput(BaseOutput):
    """Output of a denoising step.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, length)`):
            The sample with the step's tokens committed, and masked again where tokens went back.
        transfer_index (`torch.BoolTensor` of shape `(batch_size, length)`):
            Where tokens were committed and stayed.
        sampled_tokens (`torch.LongTensor` of shape `(batch_size, length)`):
            The candidate of every position; at positions that are not masked, their token. With
            `any_order` sampling only what is committed is drawn, and the others keep their mask.
        sampled_probs (`torch.Tensor` of shape `(batch_size, length)`):
            The candidate's probability under the distribution that confidence is read from, at
            evidence temperature 1; it is what `low_confidence` ranks by. 0 where `any_order` drew
            nothing.
        pred_logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            Normalised log-probabilities that the candidates were really drawn from, after
            processors, temperature, top-k and top-p. May be None if the step was told that it is
            not wanted.
        fallback (`torch.BoolTensor` of shape `(batch_size,)`):
            Rows with a window in which circuit and backbone exclude each other (no completion has
            a positive probability), so that it was drawn factorized.
        remasked (`torch.BoolTensor` of shape `(batch_size, length)`):
            Tokens committed in an earlier step that went back to being masked.
    """

    prev_sample: torch.Tensor
    transfer_index: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor | None
    fallback: torch.Tensor
    remasked: torch.Tensor
