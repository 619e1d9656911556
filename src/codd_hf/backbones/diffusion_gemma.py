"""DiffusionGemma, whose noise is uniform: a canvas of tokens behind a prompt that is read once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

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
