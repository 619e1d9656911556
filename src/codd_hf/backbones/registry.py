"""Which families and layouts there are."""

from __future__ import annotations

from typing import Any

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
OURS = {
    "codd": "is a CoDD model already: use its `backbone`, or its `load_head`",
    "codd-head": "is a CoDD head: give the backbone first, and the head as `head`",
}


def family_of(config: PretrainedConfig) -> BackboneFamily:
    """The family that a backbone with this configuration belongs to.

    Raises:
        ValueError: no family knows the model type.
    """
    for family in FAMILIES:
        if family.matches(config):
            return family
    raise ValueError(unsupported(config.model_type))


def layout_of(config: dict[str, Any]) -> CheckpointLayout | None:
    """The foreign layout that the content of a `config.json` describes, if it is one."""
    return next((layout for layout in LAYOUTS if layout.reads(config)), None)


def unsupported(model_type: str) -> str:
    """The error message for a model type that no family knows."""
    if model_type in OURS:
        return f"`backbone` {OURS[model_type]}."
    return (
        f"`text_config.model_type` is {model_type!r}, which no backbone family supports: "
        f"use a masked language model or one of {', '.join(DecoderFamily.model_types)}, a LLaDA or "
        "Dream checkpoint, or a model that brings its own code (`trust_remote_code=True`)."
    )
