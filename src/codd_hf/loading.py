"""From what a user names (an object, a folder, an id on the Hub) to heads and adapters.

What is passed for loading (`revision`, `token`, `trust_remote_code`, ...) concerns the repository
that the user named. The backbone that a head's configuration names is another one: of the user's
arguments it gets those that say how to load and where to cache, none that grant anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedConfig, PreTrainedModel

from .backbones import brings_code
from .backbones.loading import layout_of
from .configuration_codd import CoDDConfig, CoDDHeadConfig

if TYPE_CHECKING:
    from .modeling_head import CoDDHead

CACHE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only")
HUB_ARGUMENTS = (*CACHE_ARGUMENTS, "revision", "token", "subfolder")
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
ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NOT_FOUND = (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that say where and how to download."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def existing(name: str | Path, argument: str) -> str:
    """The path or id as a string.

    Raises:
        FileNotFoundError: it can only be a path, and there is nothing.
    """
    text = str(name)
    local = isinstance(name, Path) or can_only_be_a_path(text)
    if local and not Path(text).expanduser().exists():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {text!r}.")
    return str(Path(text).expanduser()) if local else text


def can_only_be_a_path(text: str) -> bool:
    """Whether a name cannot be an id on the Hub (`name` or `owner/name`)."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def find_file(name: str, filename: str, **hub: Any) -> str | None:
    """Path of a file of a folder or a repository; None if it has no such file."""
    if Path(name).is_dir():
        path = Path(name, hub.get("subfolder") or "", filename)
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(name, filename, **hub)
    except NOT_FOUND:
        return None


@contextmanager
def explained(name: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Says in one sentence what is wrong where loading `name` with `kwargs` fails."""
    try:
        yield
    except OSError as error:
        raise OSError(_explanation(name, kwargs, error)) from error


def _explanation(name: str, kwargs: dict[str, Any], error: OSError) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)

    def has(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(HFValidationError):
        return f"{name!r} is neither a folder nor an id on the Hub: check the path."
    if has(RevisionNotFoundError):
        return (
            f"{name!r} has no revision {kwargs.get('revision')!r}: give a branch, a tag or a "
            "commit of that repository."
        )
    if has(RepositoryNotFoundError, GatedRepoError):
        return (
            f"{name!r} is neither a folder nor a repository on the Hub that can be read: check "
            "the name, or give the `token` of somebody who may read it."
        )
    if has(LocalEntryNotFoundError):
        start = f"{name!r} is not a folder and could not be read from the Hub"
        if kwargs.get("local_files_only"):
            return f"{start}: `local_files_only` is set, but it is not in the cache."
        return f"{start}, and it is not in the cache: check the connection."
    if has(EntryNotFoundError):
        return _nothing_in(name)
    first_line = str(error).partition("\n")[0].rstrip(". ")
    return f"{name!r} cannot be loaded: {first_line}."


def _nothing_in(name: str) -> str:
    return (
        f"{name!r} holds no CoDD head or model, nor a backbone: its configuration (`config.json`) "
        "or its weights are missing."
    )


def read_config(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    with explained(name, kwargs):
        found = PreTrainedConfig.get_config_dict(name, **hub_arguments(kwargs))[0]
    if not found:  # what transformers gives where there is no such file
        raise OSError(_nothing_in(name))
    return found


def locate(name: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Finds what a name holds; of a pipeline, its model.

    Args:
        name: a folder or an id on the Hub.
        kwargs: the arguments of a `from_pretrained`.

    Returns:
        The content of `config.json`, and the arguments, with the `subfolder` of a pipeline's model.

    Raises:
        OSError: there is no configuration.
    """
    try:
        return read_config(name, kwargs), kwargs
    except OSError:
        if find_file(name, "model_index.json", **hub_arguments(kwargs)) is None:
            raise
    folder = Path(kwargs.get("subfolder") or "", "model")
    kwargs = {**kwargs, "subfolder": folder.as_posix()}
    return read_config(name, kwargs), kwargs


def head_in_model(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which transformers loads a head alone out of what a name holds.

    A head's own repository needs none. Of a model's or a pipeline's, only the head's tensors are
    read.

    Raises:
        OSError: there is no configuration.
        ValueError: it is not that of a head, nor of a model that has one.
    """
    found, kwargs = locate(name, kwargs)
    if found.get("model_type") == CoDDHeadConfig.model_type:
        return kwargs
    head_config = found.get("head_config")
    if found.get("model_type") != CoDDConfig.model_type or head_config is None:
        raise ValueError(
            f"{name!r} holds a model of type {found.get('model_type')!r} without a CoDD head: give "
            "the folder or id of a head, or of a CoDD model that has one."
        )
    config = CoDDHeadConfig.from_dict(dict(head_config))
    return {**kwargs, "config": config, "key_mapping": {r"^coupling_head\.": ""}}


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
        ValueError: it does not fit the backbone.
        OSError: nothing is found.
    """
    from .modeling_head import CoDDHead

    config = backbone.config
    if mask_token_id is None:
        mask_token_id = getattr(config, "mask_token_id", None)
    if isinstance(head, CoDDHeadConfig):
        head = CoDDHead(head)
    elif isinstance(head, str | Path):
        name = existing(head, "head")
        if _is_circuit(name, hub):
            from .conversion import convert_jpc

            head = convert_jpc(
                name,
                mask_token_id=mask_token_id,
                base_model_name_or_path=backbone.name_or_path or None,
                **hub,
            )
        else:
            head = CoDDHead.from_pretrained(name, **hub)
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


def _is_circuit(name: str, hub: dict[str, Any]) -> bool:
    if Path(name).is_file():
        return True
    if any(find_file(name, file, **hub) for file in ("config.json", "model_index.json")):
        return False
    from .conversion import holds_circuit

    return holds_circuit(name, **hub)


def find_adapter(name: str, **hub: Any) -> str | None:
    """Folder of the LoRA beside a head or a model (`adapter/`); None if there is none."""
    folder = Path(hub.pop("subfolder", None) or "", ADAPTER_FOLDER).as_posix()
    found = find_file(name, ADAPTER_FILES[0], subfolder=folder, **hub)
    if found is None or Path(name).is_dir():
        return None if found is None else str(Path(found).parent)
    patterns = [f"{folder}/{file}" for file in ADAPTER_FILES]
    return str(Path(snapshot_download(name, allow_patterns=patterns, **hub), folder))


def load_adapter(
    backbone: PreTrainedModel, adapter: str | Path, adapter_name: str, **hub: Any
) -> None:
    """Loads a PEFT adapter into a backbone, which stays the object that it is.

    Args:
        backbone: what the adapter was trained on.
        adapter: a folder or an id on the Hub, of the adapter or of a head that has one beside it.
        adapter_name: the name that it gets.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        OSError: there is no adapter.
        ValueError: it was not trained on a backbone like this one.
    """
    name = existing(adapter, "adapter")
    folder = find_adapter(name, **hub)
    if folder is None and find_file(name, ADAPTER_FILES[0], **hub) is not None:
        local = Path(name).is_dir()
        folder = name if local else snapshot_download(name, allow_patterns=ADAPTER_FILES, **hub)
    if folder is None or not Path(folder, ADAPTER_FILES[1]).is_file():
        raise OSError(
            f"`adapter` {name!r} holds no PEFT adapter: `{ADAPTER_FILES[0]}` and "
            f"`{ADAPTER_FILES[1]}` are needed."
        )
    misfit = None
    try:
        info = backbone.load_adapter(folder, adapter_name=adapter_name)
        missing = [key for key in info.missing_keys if f".{adapter_name}." in f"{key}."]
        if not missing and not info.unexpected_keys:
            return
    except (RuntimeError, ValueError) as error:  # other shapes; no layer of the names it wants
        misfit = error
    if backbone._hf_peft_config_loaded and adapter_name in backbone.peft_config:
        backbone.delete_adapter(adapter_name)
    raise ValueError(
        f"`adapter` {name!r} was not trained on a backbone like this one: its weights do not fit. "
        "(One of a whole CoDD model is loaded by `peft.PeftModel.from_pretrained(model, adapter)`.)"
    ) from misfit


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
    if not Path(name).exists() and (can_only_be_a_path(base) or Path(base).exists()):
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
    base = existing(base, "base_model_name_or_path")
    found = read_config(base, own)
    if layout_of(found) is None and brings_code(found):
        raise ValueError(
            f"The head {name!r} names the backbone {base!r}, which brings its own code: if you "
            f"trust that code, use `CoDDModel.from_backbone({base!r}, {name!r}, "
            "trust_remote_code=True)`."
        )
    return base, own
