"""From what a user names (an object, a folder, an id on the Hub) to heads and adapters.

What is passed for loading (`revision`, `token`, `trust_remote_code`, ...) concerns the repository
that the user named. The backbone that a head's configuration names is another one: of the user's
arguments it gets those that say how to load and where to cache, none that grant anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..backbones import layout_of, needs_remote_code
from ..configuration_codd import CoDDHeadConfig
from ..conversion import convert_jpc, holds_circuit
from ..hub.repositories import (
    CACHE_ARGUMENTS,
    HUB_ARGUMENTS,
    Repository,
    checked_name,
    is_local,
    locate,
)
from ..modeling_head import CoDDHead
from .adapter_files import read_adapter

OWN_ARGUMENTS = ("coupling", "mask_token_id", "forbidden_token_ids")
BACKBONE_ARGUMENTS = (
    *CACHE_ARGUMENTS,
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "offload_folder",
    "attn_implementation",
    "quantization_config",
)


def load_head(
    head: CoDDHead | CoDDHeadConfig | str | Path,
    backbone: PreTrainedModel,
    mask_token_id: int | None = None,
    **hub: Any,
) -> CoDDHead:
    """A head for a backbone.

    Args:
        head: a head; a folder or id of a head, of a model that has one, or of a PyJuice circuit
            (`model.jpc`), which is converted; a configuration makes a new head.
        backbone: what it is for.
        mask_token_id: the mask token, for a head that does not know it; default the backbone's.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, for a folder or an id.

    Raises:
        TypeError: it is none of these.
        ValueError: it does not fit the backbone.
        OSError: nothing is found.
    """
    config = backbone.config
    if mask_token_id is None:
        mask_token_id = getattr(config, "mask_token_id", None)
    if isinstance(head, CoDDHeadConfig):
        head = CoDDHead(head)
    elif isinstance(head, str | Path):
        name = checked_name(head, "head")
        if holds_circuit(name, **hub):
            head = convert_jpc(
                name,
                mask_token_id=mask_token_id,
                base_model_name_or_path=backbone.name_or_path or None,
                **hub,
            )
        else:
            head = CoDDHead.from_pretrained(name, **hub)
    if getattr(getattr(head, "config", None), "model_type", None) != CoDDHeadConfig.model_type:
        raise TypeError(
            "`head` must be a CoDD head, its configuration, or the folder or id of one, got "
            f"{type(head).__name__}."
        )
    if head.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"`head` has a vocabulary of {head.config.vocab_size} tokens, but the backbone's has "
            f"{config.vocab_size}: use a head that was fitted to this backbone."
        )
    if head.config.context_size not in (None, config.hidden_size):
        raise ValueError(
            f"`head` expects hidden states of size {head.config.context_size} (`context_size`), "
            f"but the backbone's have {config.hidden_size}: use a head that was fitted to this "
            "backbone."
        )
    if head.config.mask_token_id is None:
        head.config.mask_token_id = mask_token_id
    return head


def load_adapter(
    backbone: PreTrainedModel,
    adapter: str | Path,
    adapter_name: str,
    *,
    start_is_off: bool = False,
    **hub: Any,
) -> None:
    """Loads a PEFT adapter into a backbone, which stays the object that it is.

    Args:
        backbone: what the adapter was trained on.
        adapter: a folder or an id on the Hub, of the adapter or of a head that has one beside it.
        adapter_name: the name that it gets.
        start_is_off: as for [`read_adapter`]; True for the adapter beside the backbone's weights.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        OSError: there is no adapter.
        ValueError: it was not trained on a backbone like this one, or is of an unsupported kind.
    """
    name = checked_name(adapter, "adapter")
    repository = Repository(name, hub)
    folder = repository.adapter() or repository.adapter("")
    if folder is None:
        raise OSError(
            f"`adapter` {name!r} holds no PEFT adapter: `adapter_config.json` and "
            "`adapter_model.safetensors` are needed."
        )
    Repository(folder).check()
    read_adapter(backbone, folder, adapter_name, name, start_is_off=start_is_off)


def named_backbone(
    name: str, head: CoDDHeadConfig, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The backbone that a head's configuration names, and the arguments to load it with.

    Args:
        name: where the head is from.
        head: its configuration.
        kwargs: the arguments that the user gave for the head.

    Raises:
        ValueError: the head names no backbone, or one that the user has to name: a local path (in a
            downloaded head), or a repository whose code would have to run.
        TypeError: an argument is of no use.
    """
    base = head.base_model_name_or_path
    advice = "`CoDDModel.from_backbone(backbone, head)`"
    if base is None:
        raise ValueError(
            f"The head {name!r} names no backbone (`base_model_name_or_path`): join them with "
            f"{advice}."
        )
    if not Path(name).exists() and is_local(base):
        raise ValueError(
            f"The downloaded head {name!r} names the local path {base!r} as its backbone: give "
            f"the backbone yourself, with {advice}."
        )
    known = {*HUB_ARGUMENTS, *OWN_ARGUMENTS, *BACKBONE_ARGUMENTS, "trust_remote_code"}
    unknown = [k for k in kwargs if k not in known and not k.startswith("_")]
    if unknown:
        raise TypeError(
            f"`{unknown[0]}` cannot be given with a head's folder or id: load the backbone with it "
            f"and use {advice}."
        )
    own = {k: v for k, v in kwargs.items() if k in (*BACKBONE_ARGUMENTS, *OWN_ARGUMENTS)}
    if head.base_model_revision is not None:
        own["revision"] = head.base_model_revision
    base = checked_name(base, "base_model_name_or_path")
    found = locate(base, own).config
    if layout_of(found) is None and needs_remote_code(found):
        raise ValueError(
            f"The head {name!r} names the backbone {base!r}, which brings its own code: if you "
            f"trust that code, use `CoDDModel.from_backbone({base!r}, {name!r}, "
            "trust_remote_code=True)`."
        )
    return base, own
