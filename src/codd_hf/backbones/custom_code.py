"""Models that bring their own code, with the user's `trust_remote_code=True`.

The code runs only from the repository or folder that the user named. Its class is then registered
with transformers' Auto class, by which the model is built again without asking a second time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module

from ..hub.repositories import Repository
from .family import BackboneFamily, block_length_of

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
BLOCK_DIFFUSION = ("llada2", "sdar")


class CustomCodeFamily(BackboneFamily):
    """Read through `logits` and `hidden_states`; attention is the model's own, or block-causal."""

    def make_bidirectional(self, config: PretrainedConfig) -> None:
        """Asks for the block length of models that are known to be trained in blocks."""
        super().make_bidirectional(config)
        in_blocks = config.model_type.startswith(BLOCK_DIFFUSION)
        if in_blocks and block_length_of(config) is None:
            raise ValueError(
                f"`block_length` is missing: {config.model_type!r} is trained with block-causal "
                "attention, so give `from_backbone` the length of its blocks."
            )

    def from_config(self, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A randomly initialised backbone, of a class that is registered."""
        return _auto_class(config).from_config(config, trust_remote_code=False, **kwargs)

    def from_pretrained(
        self, folder: str, config: PretrainedConfig, **kwargs: Any
    ) -> PreTrainedModel:
        """A pretrained backbone, whose class is registered."""
        self.make_bidirectional(config)
        # Not through the Auto class: a repository that also holds an adapter's configuration would
        # send it, and the user's consent, on to the repository that this names.
        return _registered_class(folder, config).from_pretrained(folder, config=config, **kwargs)


def save_code(model: Any, folder: str | Path) -> None:
    """Copies into `folder` the code, if it is the model's own, that loads it from there."""
    if model.is_remote_code():
        Path(folder).mkdir(parents=True, exist_ok=True)
        custom_object_save(model, folder, config=model.config)
        custom_object_save(model.config, folder, config=model.config)


def check_trust(name: str, config: dict[str, Any], trust_remote_code: bool | None) -> None:
    """Raises unless the user allowed the code of a repository, and it is that repository's own."""
    if not trust_remote_code:
        raise ValueError(
            f"The backbone in {name!r} (model type {config.get('model_type')!r}) brings its own "
            "code, which may do anything: read it, then pass `trust_remote_code=True`."
        )
    for reference in config["auto_map"].values():
        if isinstance(reference, str) and "--" in reference:
            raise ValueError(
                f"{name!r} takes the code of its backbone from another repository, "
                f"{reference.split('--')[0]!r}, which `trust_remote_code` for {name!r} does not "
                "cover: load that model with transformers and pass it as an object."
            )


def nested_custom_config(
    repository: Repository, config: dict[str, Any], trust_remote_code: bool | None
) -> PretrainedConfig:
    """The configuration of a custom-code backbone inside a saved CoDD model, its class registered.

    The CoDD model holds the code as well; `config` is its `text_config`.
    """
    check_trust(repository.name, config, trust_remote_code)
    folder, reference = str(repository.folder), config["auto_map"]["AutoConfig"]
    config_class: Any = get_class_from_dynamic_module(reference, folder)
    config_class.register_for_auto_class()
    nested = config_class.from_dict(dict(config))
    _registered_class(folder, nested)
    return nested


def _registered_class(folder: str, config: PretrainedConfig) -> Any:
    """The model class that a folder, which the user trusts, has for its configuration."""
    auto_class = _auto_class(config)
    reference = config.auto_map[auto_class.__name__]
    model_class: Any = get_class_from_dynamic_module(reference, folder)
    model_class.register_for_auto_class(auto_class)
    auto_class.register(type(config), model_class, exist_ok=True)
    return model_class


def _auto_class(config: PretrainedConfig) -> Any:
    """The first of `AUTO_CLASSES` that a configuration names or that knows it."""
    auto_map = getattr(config, "auto_map", None) or {}
    known = [c for c in AUTO_CLASSES if c.__name__ in auto_map]
    known += [c for c in AUTO_CLASSES if type(config) in c._model_mapping]
    if not known:
        raise ValueError(
            f"The configuration {type(config).__name__} names no model class that gives logits "
            f"(`auto_map`): one of {', '.join(c.__name__ for c in AUTO_CLASSES)} is needed."
        )
    return known[0]
