"""From a folder or an id to a head for a backbone, and from a head to the backbone it names."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..backbones import execution_device
from ..configuration_codd import CoDDHeadConfig
from ..conversion import convert_jpc, holds_circuit
from ..hub.repositories import (
    CACHE_ARGUMENTS,
    HUB_ARGUMENTS,
    Repository,
    checked_name,
    is_local,
)
from ..modeling_head import CoDDHead

OWN_ARGUMENTS = ("coupling", "mask_token_id", "forbidden_token_ids")
OF_THE_HEAD = {*HUB_ARGUMENTS, "adapter_kwargs"} - {*CACHE_ARGUMENTS}


def adapter_beside(head: Any, hub: dict[str, Any]) -> Path | None:
    """The folder of the adapter beside a head, given by its folder or id; None if there is none."""
    if not isinstance(head, str | Path):
        return None
    return Repository(checked_name(head, "head"), hub).adapter()


def load_head(
    head: CoDDHead | CoDDHeadConfig | str | Path,
    backbone: PreTrainedModel,
    mask_token_id: int | None = None,
    **hub: Any,
) -> CoDDHead:
    """A head for a backbone, on its device; `mask_token_id` is for one that does not know it.

    Raises:
        TypeError: it is no head.
        ValueError: it does not fit the backbone.
    """
    config = backbone.config.get_text_config()
    if mask_token_id is None:
        mask_token_id = getattr(config, "mask_token_id", None)
    if isinstance(head, CoDDHeadConfig):
        head = CoDDHead(head)
    elif isinstance(head, str | Path):
        name = checked_name(head, "head")
        if holds_circuit(name, **hub):
            base = backbone.name_or_path or None
            head = convert_jpc(
                name, **hub, mask_token_id=mask_token_id, base_model_name_or_path=base
            )
        else:
            head = CoDDHead.from_pretrained(name, **hub)
    if not isinstance(head, CoDDHead):
        raise TypeError(
            "`head` must be a CoDD head, its configuration, or the folder or id of one, got "
            f"{type(head).__name__}."
        )
    for what, found, wanted in (
        ("a vocabulary of {} tokens", head.config.vocab_size, config.vocab_size),
        ("hidden states of size {}", head.config.context_size, config.hidden_size),
    ):
        if found not in (None, wanted):
            raise ValueError(
                f"`head` was made for {what.format(found)}, but the backbone has {wanted}: use a "
                "head that was fitted to this backbone."
            )
    if head.config.mask_token_id is None:
        head.config.mask_token_id = mask_token_id
    return head.to(execution_device(backbone))  # type: ignore[arg-type]


def named_backbone(
    name: str, head: CoDDHeadConfig, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The backbone that a head's configuration names, and the arguments to load it with.

    Of the user's arguments `kwargs` for the head in `name`, it gets those that say how to load and
    where to cache, none that grant anything.

    Raises:
        ValueError: the head names no backbone, or, in a downloaded head, a local path.
    """
    base = head.base_model_name_or_path
    own = {k: v for k, v in kwargs.items() if k not in OF_THE_HEAD and not k.startswith("_")}
    advice = f"use `CoDDModel.from_backbone({base or 'backbone'!r}, {name!r})`."
    if base is None:
        raise ValueError(
            f"The head {name!r} names no backbone (`base_model_name_or_path`): {advice}"
        )
    if not Path(name).exists() and is_local(base):
        raise ValueError(
            f"The downloaded head {name!r} names the local path {base!r} as its backbone: {advice}"
        )
    if head.base_model_revision is not None:
        own["revision"] = head.base_model_revision
    return checked_name(base, "base_model_name_or_path"), own
