"""From a folder or an id on the Hub to a backbone, and to its tokenizer."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..hub.repositories import Repository, explain_load_errors
from ..hub.stored_weights import load_stored
from .family import NOT_SUPPORTED, DecoderFamily, family_of, layout_of, unsupported
from .layout import CheckpointLayout, check_native


def load_backbone(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a backbone by transformers' own classes; no code of a repository is run.

    Args:
        name_or_path: a folder or an id on the Hub.
        **kwargs: for transformers' `from_pretrained`.

    Raises:
        ValueError: no family can hold the model, or it needs code of its own.
        OSError: nothing is found.
    """
    repository = Repository(name_or_path, kwargs)
    with explain_load_errors(repository):
        found = repository.config
        if "transformers_weights" in found:
            raise ValueError(
                f"`transformers_weights` in the configuration of {name_or_path!r} says where the "
                "weights are: remove it and give their file its standard name."
            )
        layout, model_type = layout_of(found), str(found.get("model_type"))
        if model_type in NOT_SUPPORTED:
            raise unsupported(model_type)
        if layout is not None:
            config = layout.translate(found, str(name_or_path))
            kwargs["key_mapping"] = layout.key_mapping
        elif model_type in CONFIG_MAPPING:
            if model_type in DecoderFamily.model_types:
                check_native(found, CONFIG_MAPPING[model_type])
            if any(name.startswith("AutoModel") for name in found.get("auto_map") or ()):
                warnings.warn(
                    f"The backbone in {name_or_path!r} brings code of its own, which is not run: "
                    f"it is loaded as transformers' {model_type!r}. Check that its code computes "
                    "the same.",
                    stacklevel=2,
                )
            config = AutoConfig.from_pretrained(repository.folder, trust_remote_code=False)
        elif "auto_map" in found:
            raise ValueError(
                f"The backbone in {name_or_path!r} (model type {model_type!r}) brings its own "
                "code, which is not run here: load it by transformers' `AutoModelForCausalLM."
                f"from_pretrained({name_or_path!r}, trust_remote_code=True)`, if you trust it, and "
                "give the model to `CoDDModel.from_backbone`."
            )
        else:
            raise unsupported(model_type)
        family = family_of(config)
        family.make_bidirectional(config)
        kind: Any = family.auto_class
        build, unused = family.from_config, family.unused_weights
        if layout is not None and layout.converters():
            kind = _class_reading(layout, config)
            build = kind._from_config
        load = partial(kind.from_pretrained, config=config)
        model = load_stored(repository, load, config, build, unused=unused, **kwargs)
    if layout is not None:
        # transformers remembers the mapping to write the old names back, which no native
        # configuration could read.
        model.__dict__.pop("_weight_conversions", None)
        if layout.converters():
            model.__class__ = type(model).__base__
    return model


def _class_reading(layout: CheckpointLayout, config: PretrainedConfig) -> Any:
    """The native class by a name of its own, under which transformers finds the conversions.

    Its table of them is global; by that name they concern no other model that is loaded or saved.
    """
    native: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = f"{type(layout).__name__}Weights"
    register_checkpoint_conversion_mapping(name, layout.converters(), overwrite=True)
    return type(name, (native,), {})


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a backbone; that of a known layout without the code it brings.

    Raises:
        ValueError: it needs code of its own.
    """
    layout = layout_of(PretrainedConfig.get_config_dict(folder)[0])
    named = str(get_tokenizer_config(folder).get("tokenizer_class"))
    if layout is not None and layout.tokenizer_class and not hasattr(transformers, named):
        return getattr(transformers, layout.tokenizer_class).from_pretrained(folder)
    # Of a configuration that transformers does not know, it would read what it can, and warn. The
    # class that it has for a model would cut text as that model's own tokenizer does, whatever a
    # tokenizer of no particular class says.
    is_plain = named in ("TokenizersBackend", "PreTrainedTokenizerFast")
    known: dict[str, Any] = {"config": PretrainedConfig()} if layout or is_plain else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **known)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The tokenizer in {str(folder)!r} brings its own code, which is not run here: load it "
            "by transformers, if you trust it, and give it as `tokenizer`."
        ) from error
