"""From a folder or an id on the Hub to the components of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from diffusers import PipelineQuantizationConfig
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..backbones import load_backbone, load_tokenizer
from ..checks.errors import reading
from ..coupling.loading import BACKBONE_ARGUMENTS, OWN_ARGUMENTS
from ..decoding.generation_settings import scheduler_of
from ..hub.repositories import (
    CACHE_ARGUMENTS,
    ask_once,
    explain_load_errors,
    first_file,
    hub_arguments,
    read_config,
)
from ..modeling_codd import CoDDModel
from ..schedulers import CoDDScheduler

COMPONENTS = ("model", "scheduler", "tokenizer")


def load_components(
    name_or_path: str, kwargs: dict[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    """Loads the components of anything but a pipeline repository, and finds the folder of that.

    diffusers cannot download a pipeline whose components live in another package, so that it is
    given a folder.

    Args:
        name_or_path: a folder, or an id on the Hub.
        kwargs: the arguments of `from_pretrained`.

    Returns:
        The folder of a pipeline and the arguments for diffusers, its model among them; or no folder
        and `model`, `scheduler` and `tokenizer`.

    Raises:
        OSError: nothing is found, or nothing that a pipeline can be made of.
        ValueError: `model_index.json` names anything but a CoDD pipeline's classes.
    """
    hub = hub_arguments(kwargs)
    inside = hub.pop("subfolder", None) or ""
    folder, in_folder = Path(name_or_path, inside), {**hub, "subfolder": inside}
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            check_index(folder / "model_index.json", bool(kwargs.get("trust_remote_code")))
            return folder, _with_model(folder, kwargs)
        if not (folder / "config.json").is_file():
            raise OSError(
                f"{str(folder)!r} holds neither `model_index.json` (a pipeline) nor `config.json` "
                "(a model, a head or a backbone): give the folder of one of these."
            )
    else:
        with explain_load_errors(name_or_path, hub):
            found = first_file(name_or_path, ("model_index.json", "config.json"), **in_folder)
            if found == "model_index.json":
                trusted = kwargs.get("trust_remote_code")
                folder = Path(_download(name_or_path, inside, trusted, hub), inside)
                check_index(folder / "model_index.json", bool(trusted))
        if found == "model_index.json":
            return folder, _with_model(folder, kwargs)

    kwargs, hub = dict(kwargs), in_folder
    given = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
    config = read_config(name_or_path, hub)
    model_type = config.get("model_type")

    with_tokenizer = "tokenizer" not in given
    if with_tokenizer:
        trusted = kwargs.get("trust_remote_code")
        given["tokenizer"] = _tokenizer_beside(name_or_path, trusted, hub)
    if "model" not in given:
        if model_type in ("codd", "codd-head"):
            given["model"] = CoDDModel.from_pretrained(name_or_path, **kwargs).eval()
        else:
            parts = {k: kwargs.pop(k) for k in ("head", "adapter", *OWN_ARGUMENTS) if k in kwargs}
            shared = {k: v for k, v in kwargs.items() if k in (*CACHE_ARGUMENTS, "token")}
            with explain_load_errors(name_or_path, hub):
                backbone = load_backbone(name_or_path, **kwargs)
            tokens = _tokens_of_backbone(backbone.config, given["tokenizer"])
            given["model"] = CoDDModel.from_backbone(backbone, **{**tokens, **shared, **parts})
    if with_tokenizer and given["tokenizer"] is None and model_type == "codd-head":
        # After the model, which refuses a head that names what only the user may name; and without
        # what the user gave for the repository that the user named.
        of_base = {name: hub[name] for name in CACHE_ARGUMENTS if name in hub}
        of_base["revision"] = config.get("base_model_revision")
        given["tokenizer"] = _tokenizer_beside(config["base_model_name_or_path"], False, of_base)
    return None, {"scheduler": scheduler_of(given["model"].generation_config), **given}


def check_index(path: Path, trusted: bool) -> None:
    """Raises unless a `model_index.json` describes a CoDD pipeline and nothing else.

    diffusers imports the modules and runs the code that the file names, before it looks at what
    they hold.

    Args:
        path: of the file.
        trusted: whether the user trusts the code of the repository, which a tokenizer may need.

    Raises:
        ValueError: it names another class, library or component.
        OSError: it is damaged.
    """
    with reading(f"{str(path)!r}"):
        index = json.loads(path.read_text(encoding="utf-8"))
    known = ("_class_name", "_diffusers_version", "_module", "_name_or_path", *COMPONENTS)
    if not isinstance(index, dict):
        raise OSError(f"{str(path)!r} must hold a JSON object, got {index!r:.100}.")
    unknown = [name for name in index if name not in known]
    if unknown or not isinstance(index.get("_class_name"), str):
        name = unknown[0] if unknown else "_class_name"
        raise ValueError(
            f"`{name}` in {str(path)!r} must be {'left out' if unknown else 'a class name'}, got "
            f"{index.get(name)!r:.100}: a CoDD pipeline has {', '.join(COMPONENTS)} and no more."
        )
    for name, cls in (("model", CoDDModel), ("scheduler", CoDDScheduler)):
        wanted = [cls.__module__, cls.__name__]
        if index.get(name) != wanted:
            raise ValueError(
                f"`{name}` in {str(path)!r} must be {wanted}, got {index.get(name)!r:.100}: give "
                "the folder of a CoDD pipeline."
            )
    tokenizer = index.get("tokenizer", [None, None])
    if tokenizer != [None, None] and not trusted:
        library, name = tokenizer if isinstance(tokenizer, list) and len(tokenizer) == 2 else "??"
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
        if library != "transformers" or not is_tokenizer:
            raise ValueError(
                f"`tokenizer` in {str(path)!r} must be a tokenizer of transformers, got "
                f"{tokenizer!r:.100}: load it yourself and give it as `tokenizer`, and remove it "
                "from the file."
            )


def _download(name: str, inside: str, trusted: bool | None, hub: dict[str, Any]) -> str:
    """The snapshot of a repository: JSON, weights, tokenizer, and code that the user trusts."""
    endings = ("json", "safetensors", "txt", "model", "jinja", *(["py"] if trusted else []))
    patterns = [Path(inside, f"*.{ending}").as_posix() for ending in endings]
    return snapshot_download(name, allow_patterns=patterns, **hub)


def _with_model(folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for diffusers, the pipeline's model loaded.

    diffusers would pass on to a model neither names of dtypes, nor `attn_implementation`,
    `trust_remote_code` and most of what else transformers knows.
    """
    if "model" in kwargs or isinstance(
        kwargs.get("quantization_config"), PipelineQuantizationConfig
    ):
        return kwargs
    names = (*BACKBONE_ARGUMENTS, *OWN_ARGUMENTS, "variant", "use_safetensors")
    own = {name: kwargs[name] for name in names if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in own}
    trusted = kwargs.get("trust_remote_code")
    dtype = own.pop("torch_dtype", None) or own.get("dtype")
    own["dtype"] = dtype.get("model", dtype.get("default")) if isinstance(dtype, dict) else dtype
    model = CoDDModel.from_pretrained(folder / "model", trust_remote_code=trusted, **own)
    return {**rest, "model": model.eval()}


def _tokenizer_beside(
    name_or_path: str, trust_remote_code: bool | None, hub: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None where there is none."""
    folder = Path(name_or_path, hub.get("subfolder") or "")
    if folder.is_dir():
        if not (folder / "tokenizer_config.json").is_file():
            return None
    elif ask_once(name_or_path, "tokenizer_config.json", hub) is None:
        hub = {**hub, "local_files_only": True}  # else transformers tries for minutes
    try:
        tokenizer = load_tokenizer(name_or_path, trust_remote_code, **hub)
    except (OSError, ValueError):
        return None
    # Without files that it understands, transformers makes one of special tokens alone.
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None


def _tokens_of_backbone(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The mask token and the forbidden tokens of a bare backbone, as its tokenizer has them."""
    if tokenizer is None:
        return {}
    mask_token_id = getattr(config, "mask_token_id", None)
    forbidden = list(range(len(tokenizer), config.vocab_size))
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        forbidden = [tokenizer.pad_token_id, *forbidden]
    return {
        "mask_token_id": tokenizer.mask_token_id if mask_token_id is None else mask_token_id,
        "forbidden_token_ids": forbidden or None,
    }
