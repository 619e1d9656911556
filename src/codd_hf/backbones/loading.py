"""From a folder or an id on the Hub to a backbone, and to its tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..hub.repositories import Repository, explain_load_errors
from ..hub.stored_weights import load_stored
from .custom_code import CustomCodeFamily, check_trust
from .family import family_of, layout_of, needs_remote_code, unsupported


def load_backbone(
    name_or_path: str,
    *,
    trust_remote_code: bool | None = None,
    block_length: int | None = None,
    logit_shift: bool | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a backbone, with transformers' own classes wherever they can hold it.

    Args:
        name_or_path: a folder or an id on the Hub.
        trust_remote_code: allows the code in that repository, if transformers has none for the
            model. LLaDA and Dream checkpoints load without, and their code is never run.
        block_length: attention is block-causal in blocks of so many tokens; default, that of the
            configuration (`block_length`), or else full attention.
        logit_shift: whether the model's logits at a position are of the next token; default, that
            of the layout or the configuration (`logit_shift`), or else no.
        **kwargs: for transformers' `from_pretrained`.

    Raises:
        ValueError: no family can hold the model, or it brings code that the user did not allow.
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
        layout = layout_of(found)
        if layout is not None:
            config = layout.translate(found)
            kwargs["key_mapping"] = layout.key_mapping
        else:
            config = _native_config(repository, trust_remote_code)
        for name, value in (("block_length", block_length), ("logit_shift", logit_shift)):
            if value is not None:
                setattr(config, name, value)
        family = family_of(config)
        # The class of a model that brings its code is known only as it is loaded.
        build = None if isinstance(family, CustomCodeFamily) else family.from_config
        load: Any = partial(family.from_pretrained, config=config)
        unused = family.unused_weights
        model = load_stored(repository, load, config, build, unused=unused, **kwargs)
    if layout is not None:
        # transformers remembers the mapping to write the old names back, which no native
        # configuration could read.
        model.__dict__.pop("_weight_conversions", None)
    return model


def _native_config(repository: Repository, trust_remote_code: bool | None) -> PretrainedConfig:
    """The configuration of a class of transformers, or of the repository's own if it may run."""
    found = repository.config
    model_type, runs_code = found.get("model_type"), needs_remote_code(found)
    if runs_code:
        check_trust(repository.name, found, trust_remote_code)
    elif model_type is not None and model_type not in CONFIG_MAPPING:
        raise unsupported(model_type)
    return AutoConfig.from_pretrained(str(repository.folder), trust_remote_code=runs_code)


def load_tokenizer(
    folder: str | Path, trust_remote_code: bool | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a backbone; that of a known layout without the code it brings."""
    layout = layout_of(PretrainedConfig.get_config_dict(folder)[0])
    if layout is not None and layout.tokenizer_class is not None:
        return getattr(transformers, layout.tokenizer_class).from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(trust_remote_code))
