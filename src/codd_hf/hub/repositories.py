"""Files of a folder or of a repository on the Hub, and one sentence where they cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedConfig

from ..checks.errors import is_of_a_library, reason
from ..checks.files import check_files

CACHE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only")
HUB_ARGUMENTS = (*CACHE_ARGUMENTS, "revision", "token", "subfolder")
LOADING = RLock()
NOT_FOUND = (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that say where and how to download."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def find_file(name: str, filename: str, **hub: Any) -> str | None:
    """Path of a file of a folder or a repository; None if it has no such file."""
    try:
        return _ask_for(name, filename, hub)
    except LocalEntryNotFoundError:  # not in the cache, and the Hub cannot be reached
        return None


def first_file(name: str, filenames: tuple[str, ...], **hub: Any) -> str | None:
    """Which of some files a folder or a repository has: the first, but of cached ones if any.

    Raises:
        LocalEntryNotFoundError: none is in the cache, and the Hub cannot be reached.
    """
    in_cache = [f for f in filenames if isinstance(_in_cache(name, f, hub), str)]
    tried = dict.fromkeys((*in_cache, *filenames))
    return next((file for file in tried if _ask_for(name, file, hub) is not None), None)


def _ask_for(name: str, filename: str, hub: dict[str, Any]) -> str | None:
    if Path(name).is_dir():
        path = Path(name, hub.get("subfolder") or "", filename)
        return str(path) if path.is_file() else None
    known_missing = _in_cache(name, filename, hub) is _CACHED_NO_EXIST
    try:
        if known_missing and not ask_once(name, filename, hub):
            return None
        return hf_hub_download(name, filename, **hub)
    except LocalEntryNotFoundError:
        raise
    except NOT_FOUND:
        return None


def _in_cache(name: str, filename: str, hub: dict[str, Any]) -> Any:
    """The path of a file in the cache, `_CACHED_NO_EXIST` if the repository had none, or None."""
    path = Path(hub.get("subfolder") or "", filename).as_posix()
    try:
        return try_to_load_from_cache(name, path, hub.get("cache_dir"), hub.get("revision"))
    except HFValidationError:
        return None


def ask_once(name: str, filename: str, hub: dict[str, Any]) -> bool | None:
    """Whether a repository has a file now; None if the Hub cannot be reached.

    A download would try for 20 seconds where there is no network.
    """
    if hub.get("local_files_only"):
        return None
    url = hf_hub_url(
        name, filename, subfolder=hub.get("subfolder") or None, revision=hub.get("revision")
    )
    try:
        get_hf_file_metadata(url, token=hub.get("token"))
    except HfHubHTTPError:
        return False
    except (HTTPError, OSError):
        return None
    return True


@contextmanager
def explain_load_errors(name: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """A door at which a library loads `name` with `kwargs`; one sentence where that fails.

    One thread loads at a time, as what transformers changes meanwhile is the whole process's: the
    default dtype, the functions of `torch.nn.init`, the tying of weights.

    Raises:
        OSError: a file is damaged, or what is asked for is not there.
    """
    _check_folder(name, kwargs)
    try:
        with LOADING:
            yield
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        _check_folder(name, kwargs)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(_explanation(name, kwargs, error)) from error


def _check_folder(name: str, kwargs: dict[str, Any]) -> None:
    """Checks the files of a folder, or those of a repository that are in the cache."""
    hub = hub_arguments(kwargs)
    found = Path(name, hub.get("subfolder") or "", "config.json")
    if not Path(name).is_dir():
        cached = _in_cache(name, "config.json", hub)
        if not isinstance(cached, str):
            return
        found = Path(cached)
    check_files(found.parent)


@contextmanager
def reaching_hub() -> Iterator[None]:
    """Says in one sentence that the Hub cannot be reached; its own refusals pass as they are.

    Raises:
        OSError: it cannot.
    """
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"The Hub cannot be reached ({reason(error)}): check the connection."
        ) from error


def _explanation(name: str, kwargs: dict[str, Any], error: BaseException) -> str:
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
    return f"{name!r} cannot be loaded: {reason(error)}."


def _nothing_in(name: str) -> str:
    return (
        f"{name!r} holds no CoDD head or model, nor a backbone: its configuration (`config.json`) "
        "or its weights are missing."
    )


def refuse_adapter(name: str, kwargs: dict[str, Any]) -> None:
    """Refuses to load a model from where an adapter lies.

    transformers would load, in place of what is there, from the path or repository that the
    adapter's configuration names.

    Args:
        name: a folder or an id on the Hub.
        kwargs: the arguments of a `from_pretrained`.

    Raises:
        ValueError: there is an adapter.
    """
    # transformers' Auto classes have followed it already, and say where it was.
    found = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path", None)
    if found or find_file(name, "adapter_config.json", **hub_arguments(kwargs)) is not None:
        raise ValueError(
            f"{found or name!r} holds an adapter (`adapter_config.json`), which names other "
            "weights than its own: load the model that it is for, and give it in a folder of its "
            "own as `adapter`."
        )


def read_config(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    with explain_load_errors(name, kwargs):
        try:
            found = PreTrainedConfig.get_config_dict(name, **hub_arguments(kwargs))[0]
        except (ValueError, RecursionError, TypeError) as error:
            raise OSError(f"`config.json` cannot be read ({error})") from error
    if not found:  # what transformers gives where there is no such file
        raise OSError(_nothing_in(name))
    if not isinstance(found, dict):
        raise OSError(f"{name!r} cannot be loaded: `config.json` must hold a JSON object.")
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
    with explain_load_errors(name, kwargs):
        found = first_file(name, ("config.json", "model_index.json"), **hub_arguments(kwargs))
    if found == "model_index.json":
        folder = Path(kwargs.get("subfolder") or "", "model")
        kwargs = {**kwargs, "subfolder": folder.as_posix()}
    return read_config(name, kwargs), kwargs
