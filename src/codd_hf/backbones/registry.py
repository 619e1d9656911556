"""Which families and layouts there are."""

from __future__ import annotations

from transformers import PretrainedConfig

from .custom_code import CustomCodeFamily
from .decoder import DecoderFamily
from .dream import DreamLayout
from .family import BackboneFamily
from .layout import CheckpointLayout
from .llada import LLaDALayout
from .masked_lm import MaskedLMFamily

FAMILIES: list[BackboneFamily] = [CustomCodeFamily(), DecoderFamily(), MaskedLMFamily()]
LAYOUTS: list[CheckpointLayout] = [LLaDALayout(), DreamLayout()]


def family_of(config: PretrainedConfig) -> BackboneFamily:
    """The family that a backbone with this configuration belongs to.

    Raises:
        ValueError: no family knows the model type.
    """
    for family in FAMILIES:
        if family.matches(config):
            return family
    raise ValueError(unsupported(config.model_type))


def unsupported(model_type: str) -> str:
    """The error message for a model type that no family knows."""
    if model_type == "codd":
        return "`backbone` is a CoDD model already: use its `backbone`, or its `load_head`."
    if model_type == "codd-head":
        return "`backbone` is a CoDD head: give the backbone first, and the head as `head`."
    return (
        f"`text_config.model_type` is {model_type!r}, which no backbone family supports: "
        f"use a masked language model or one of {', '.join(DecoderFamily.model_types)}, a LLaDA or "
        "Dream checkpoint, or a model that brings its own code (`trust_remote_code=True`)."
    )
