"""The output of `CoDDPipeline`."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class CoDDPipelineOutput(BaseOutput):
    """Output of a generation.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, longest)`):
            The generated tokens, without the prompt, with padding behind their end. With `infill`,
            the whole texts.
        texts (`list[str]`, *optional*):
            The generated texts up to their end; None with `output_type="seq"`.
        num_passes (`int`): How often the backbone was run: at most `num_inference_steps`, and
            what edits take beyond them.
        passes_per_row (`torch.LongTensor` of shape `(batch_size,)`): Those that each prompt took
            part in.
    """

    sequences: torch.Tensor
    texts: list[str] | None = None
    num_passes: int | None = None
    passes_per_row: torch.Tensor | None = None
