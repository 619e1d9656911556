"""DiffusionGemma, whose noise is uniform: a canvas of tokens behind a prompt that is read once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from .family import BackboneFamily, BackboneStates


class DiffusionGemmaFamily(BackboneFamily):
    """transformers' `DiffusionGemmaForBlockDiffusion`, whose attention stays as it is."""

    auto_class = AutoModelForImageTextToText
    model_types = ("diffusion_gemma",)
    noise = "uniform"

    def make_bidirectional(self, config: PretrainedConfig) -> None:
        """Nothing: the decoder sees the whole canvas, the encoder what lies before it."""

    def check(self, model: PreTrainedModel) -> None:
        """Refuses settings of models that are decoded here."""
        for name in ("block_length", "logit_shift"):
            if getattr(model.config, name, None) is not None:
                raise ValueError(f"`{name}` cannot be set for DiffusionGemma: leave it out.")

    def run(self, *args: Any, **kwargs: Any) -> BackboneStates:
        """Refused: rows of tokens do not tell where a canvas begins."""
        raise ValueError(
            "A DiffusionGemma cannot be run on rows of tokens alone: call the model with "
            "`decoder_input_ids`, as transformers' class, or its `generate`."
        )

    def canvas_states(
        self, model: PreTrainedModel, input_ids: torch.Tensor, start: torch.Tensor
    ) -> BackboneStates:
        """A pass over rows `[batch, length]` whose canvases begin at `start` `[batch]`, in them.

        All before is the prompt. Canvases are predicted as in the first pass of a loop, and nothing
        else is.
        """
        config: Any = model.config
        size, longest = config.canvas_length, max(int(start.max()), 1)
        column = torch.arange(max(longest, size, input_ids.shape[1]), device=start.device)
        before = start[:, None] - longest + column[:longest]  # padded on the left
        real = before >= 0
        states: Any = model(
            input_ids=input_ids.gather(1, before.clamp(min=0)),
            attention_mask=real,
            decoder_input_ids=input_ids.gather(1, start[:, None] + column[:size]),
            decoder_attention_mask=F.pad(real, (0, size), value=True),
            output_hidden_states=True,
        )

        def read_logits(index: Any) -> torch.Tensor:
            return states.logits if index is None else states.logits[index]

        place = (column[: input_ids.shape[1]] - start[:, None]).clamp(0, size - 1)
        return BackboneStates(states.hidden_states[-1], read_logits).gathered(place)


def accept_old_names(model: PreTrainedModel) -> None:
    """Lets diffusers' pipeline run on a DiffusionGemma.

    diffusers 0.42 calls the cache `past_key_values`. transformers has renamed it and takes the old
    name too, but for where the decoder makes its mask.
    """
    decoder: Any = model.model.decoder
    make = decoder.create_diffusion_decoder_attention_mask
    if not isinstance(make, partial) and "cache" in signature(make).parameters:
        decoder.create_diffusion_decoder_attention_mask = partial(_under_either_name, make)


def _under_either_name(make: Callable, *args: Any, **kwargs: Any) -> Any:
    if "past_key_values" in kwargs:
        kwargs["cache"] = kwargs.pop("past_key_values")
    return make(*args, **kwargs)
