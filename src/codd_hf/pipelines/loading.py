"""From a folder or an id on the Hub to the components of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from diffusers import PipelineQuantizationConfig
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..backbones import load_backbone, load_tokenizer
from ..coupling.heads import BACKBONE_ARGUMENTS, OWN_ARGUMENTS
from ..decoding.generation_settings import scheduler_of
from ..hub.repositories import Repository, explain_load_errors, shared_arguments
from ..modeling_codd import CoDDModel
from ..schedulers import CoDDScheduler

COMPONENTS = ("model", "scheduler", "tokenizer")
OF_INDEX = ("_class_name", "_diffusers_version", "_module", "_name_or_path")
DOWNLOADED = ("json", "safetensors", "txt", "model", "jinja")


def load_components(name: str, kwargs: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Loads the components of anything but a pipeline repository, and finds the folder of that.

    diffusers cannot download a pipeline whose components live in another package.

    Returns:
        The folder of a pipeline and the arguments for diffusers, its model among them; or no folder
        and `model`, `scheduler` and `tokenizer`.

    Raises:
        OSError: nothing is found, or nothing that a pipeline can be made of.
        ValueError: `model_index.json` names anything but a CoDD pipeline's classes.
    """
    repository, trusted = Repository(name, kwargs), kwargs.get("trust_remote_code")
    with explain_load_errors(repository):
        is_pipeline = repository.first("model_index.json", "config.json") == "model_index.json"
        if is_pipeline:
            folder = _folder_of(repository, trusted)
            check_index(folder / "model_index.json", repository, bool(trusted))
        else:
            model_type = repository.config.get("model_type")
    if is_pipeline:
        return folder, _with_model(folder, kwargs)

    kwargs = dict(kwargs)
    given = {part: kwargs.pop(part) for part in COMPONENTS if part in kwargs}
    with_tokenizer = "tokenizer" not in given
    if with_tokenizer:
        given["tokenizer"] = _tokenizer_beside(repository, trusted)
    if "model" not in given and model_type in ("codd", "codd-head"):
        given["model"] = CoDDModel.from_pretrained(name, **kwargs).eval()
    elif "model" not in given:
        parts = {k: kwargs.pop(k) for k in ("head", "adapter", *OWN_ARGUMENTS) if k in kwargs}
        backbone = load_backbone(name, **kwargs)
        tokens = _tokens_of_backbone(backbone.config, given["tokenizer"])
        parts = {**tokens, **shared_arguments(kwargs), **parts}
        given["model"] = CoDDModel.from_backbone(backbone, **parts)
    if with_tokenizer and given["tokenizer"] is None and model_type == "codd-head":
        # After the model, which refuses a head that names what only the user may name; and without
        # the token of the repository that the user named.
        config = repository.config
        of_base = {**shared_arguments(kwargs), "revision": config.get("base_model_revision")}
        of_base.pop("token", None)
        base = Repository(config["base_model_name_or_path"], of_base)
        given["tokenizer"] = _tokenizer_beside(base, False)
    return None, {"scheduler": scheduler_of(given["model"].generation_config), **given}


def check_index(path: Path, repository: Repository, trusted: bool) -> None:
    """Raises unless a `model_index.json` describes a CoDD pipeline and nothing else.

    diffusers imports the modules and runs the code that the file names, before it looks at what
    they hold. Where the user has `trusted` the repository, a tokenizer may bring its code.
    """
    index = repository.read(path)

    def refuse(name: str, wanted: Any) -> None:
        raise ValueError(
            f"`{name}` in {str(path)!r} must be {wanted}, got {index.get(name)!r:.100}: give the "
            f"folder of a CoDD pipeline, which has {', '.join(COMPONENTS)} and no more."
        )

    for name in index:
        if name not in (*OF_INDEX, *COMPONENTS):
            refuse(name, "left out")
    if not isinstance(index.get("_class_name"), str):
        refuse("_class_name", "a class name")
    for name, cls in (("model", CoDDModel), ("scheduler", CoDDScheduler)):
        if index.get(name) != [cls.__module__, cls.__name__]:
            refuse(name, [cls.__module__, cls.__name__])
    tokenizer = index.get("tokenizer", [None, None])
    if tokenizer != [None, None] and not trusted:
        library, name = tokenizer if isinstance(tokenizer, list) and len(tokenizer) == 2 else "??"
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
        if library != "transformers" or not is_tokenizer:
            refuse("tokenizer", "a tokenizer of transformers, or be given as `tokenizer`")


def _folder_of(repository: Repository, trusted: bool | None) -> Path:
    """A folder, or the snapshot of a repository: also with its code, if the user trusts it."""
    if Path(repository.name).is_dir():
        return Path(repository.name, repository.subfolder)
    hub, inside = dict(repository.hub), repository.subfolder
    hub.pop("subfolder", None)
    endings = (*DOWNLOADED, "py") if trusted else DOWNLOADED
    patterns = [Path(inside, f"*.{ending}").as_posix() for ending in endings]
    return Path(snapshot_download(repository.name, allow_patterns=patterns, **hub), inside)


def _with_model(folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for diffusers, the pipeline's model loaded.

    diffusers would pass on to a model neither names of dtypes, nor `attn_implementation`,
    `trust_remote_code` and most of what else transformers knows.
    """
    by_diffusers = isinstance(kwargs.get("quantization_config"), PipelineQuantizationConfig)
    if "model" in kwargs or by_diffusers:
        return kwargs
    names = (*BACKBONE_ARGUMENTS, *OWN_ARGUMENTS, "variant", "use_safetensors")
    own = {name: kwargs[name] for name in names if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in own}
    dtype = own.pop("torch_dtype", None) or own.get("dtype")
    own["dtype"] = dtype.get("model", dtype.get("default")) if isinstance(dtype, dict) else dtype
    trusted = kwargs.get("trust_remote_code")
    model = CoDDModel.from_pretrained(folder / "model", trust_remote_code=trusted, **own)
    return {**rest, "model": model.eval()}


def _tokenizer_beside(
    repository: Repository, trust_remote_code: bool | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None where there is none."""
    name, hub, filename = repository.name, repository.hub, "tokenizer_config.json"
    if Path(name).is_dir():
        if repository.find(filename) is None:
            return None
    elif repository.has_now(filename) is None:
        hub = {**hub, "local_files_only": True}  # else transformers tries for minutes
    try:
        tokenizer = load_tokenizer(name, trust_remote_code, **hub)
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
