"""The head alone out of what a name holds."""

from __future__ import annotations

from typing import Any

from ..configuration_codd import CoDDConfig, CoDDHeadConfig
from .repositories import locate


def head_in_model(name: str, kwargs: dict[str, Any]) -> tuple[CoDDHeadConfig, dict[str, Any], str]:
    """How transformers loads a head alone out of what a name holds.

    A head's own repository needs nothing special. Of a model's or a pipeline's, only the head's
    tensors are read.

    Returns:
        The head's configuration, the arguments for transformers, and the prefix of the names of the
        head's weights.

    Raises:
        OSError: there is no configuration.
        ValueError: it is not that of a head, nor of a model that has one.
    """
    found, kwargs = locate(name, kwargs)
    if found.get("model_type") == CoDDHeadConfig.model_type:
        return CoDDHeadConfig.from_dict(dict(found)), kwargs, ""
    head_config = found.get("head_config")
    if found.get("model_type") != CoDDConfig.model_type or head_config is None:
        raise ValueError(
            f"{name!r} holds a model of type {found.get('model_type')!r} without a CoDD head: give "
            "the folder or id of a head, or of a CoDD model that has one."
        )
    config = CoDDHeadConfig.from_dict(dict(head_config))
    prefix = "coupling_head."
    return config, {**kwargs, "config": config, "key_mapping": {r"^coupling_head\.": ""}}, prefix
