"""Backbones: one short file per family, and the registry that finds the family of a model."""

from __future__ import annotations

from transformers import PretrainedConfig

from .decoder import DecoderFamily
from .family import BackboneFamily, BackboneStates
from .masked_lm import MaskedLMFamily

FAMILIES: list[BackboneFamily] = [DecoderFamily(), MaskedLMFamily()]


def family_of(config: PretrainedConfig) -> BackboneFamily:
    """The family that a backbone with this configuration belongs to.

    Raises:
        ValueError: no family knows the model type.
    """
    for family in FAMILIES:
        if family.matches(config):
            return family
    raise ValueError(
        f"`text_config.model_type` is {config.model_type!r}, which no backbone family supports: "
        f"use a masked language model or one of {', '.join(DecoderFamily.model_types)}."
    )


__all__ = ["FAMILIES", "BackboneFamily", "BackboneStates", "family_of"]
