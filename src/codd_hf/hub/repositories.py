"""Folders and repositories on the Hub: their files, and one sentence where they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
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

from ..checks.errors import is_of_a_library, reason
from .stored_weights import read_headers

CACHE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only")
HUB_ARGUMENTS = (*CACHE_ARGUMENTS, "revision", "token", "subfolder")
NOT_FOUND = (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)
LOADING = RLock()
ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TYPES = {"_name_or_path": str, "output_attentions": bool, "output_hidden_states": bool}
"""Fields that transformers takes as they are, and stumbles over in use."""
REMEDY = "save it or download it again"
NOTHING = (
    "holds no CoDD head, model or pipeline, nor a backbone: its configuration (`config.json`) or "
    "its weights are missing."
)


def shared_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` that concern every repository that is read."""
    return {key: kwargs[key] for key in (*CACHE_ARGUMENTS, "token") if key in kwargs}


def checked_name(name: str | Path, argument: str) -> str:
    """A path or id as a string; raises for anything else, and where a path leads to nothing."""
    if not isinstance(name, str | Path) or not str(name).strip():
        raise TypeError(f"`{argument}` must be a folder or an id on the Hub, got {name!r}.")
    text = str(name)
    if not isinstance(name, Path) and not can_only_be_a_path(text):
        return text
    path = Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {text!r}.")
    return str(path)


def can_only_be_a_path(text: str) -> bool:
    """Whether a name cannot be an id on the Hub (`name` or `owner/name`)."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def is_local(name: str) -> bool:
    """Whether a name means something on this machine only."""
    return can_only_be_a_path(name) or Path(name).exists()


class Repository:
    """A folder, or a repository on the Hub; each of its files is read once.

    Args:
        name: a path or an id.
        kwargs: the arguments of a `from_pretrained`; `HUB_ARGUMENTS` among them count.
    """

    def __init__(self, name: str, kwargs: dict[str, Any] | None = None) -> None:
        self.name = name
        self.hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in (kwargs or {})}
        self.contents: dict[Path, Any] = {}

    @property
    def subfolder(self) -> str:
        """The folder inside the repository that holds the files; empty for its root."""
        return self.hub.get("subfolder") or ""

    @property
    def folder(self) -> Path | None:
        """Where the files are on this machine; None if nothing is in the cache."""
        if Path(self.name).is_dir():
            return Path(self.name, self.subfolder)
        cached = self._cached("config.json")
        return Path(cached).parent if isinstance(cached, str) else None

    def inside(self, folder: str) -> Repository:
        """A folder of the repository."""
        return Repository(
            self.name, {**self.hub, "subfolder": Path(self.subfolder, folder).as_posix()}
        )

    def find(self, filename: str) -> str | None:
        """Path of a file, downloaded if need be; None if there is none."""
        try:
            return self._ask_for(filename)
        except LocalEntryNotFoundError:  # not in the cache, and the Hub cannot be reached
            return None

    def first(self, *filenames: str) -> str | None:
        """Which of some files is there: the first, or the first of those in the cache."""
        in_cache = [file for file in filenames if isinstance(self._cached(file), str)]
        tried = dict.fromkeys((*in_cache, *filenames))
        return next((file for file in tried if self._ask_for(file) is not None), None)

    def has_now(self, filename: str) -> bool | None:
        """Whether the Hub has a file; None if it cannot be reached (a download tries for 20 s)."""
        if self.hub.get("local_files_only"):
            return None
        of_file = {"subfolder": self.subfolder or None, "revision": self.hub.get("revision")}
        try:
            url = hf_hub_url(self.name, filename, **of_file)
            get_hf_file_metadata(url, token=self.hub.get("token"))
        except HfHubHTTPError:
            return False
        except (HTTPError, OSError):
            return None
        return True

    def _ask_for(self, filename: str) -> str | None:
        if Path(self.name).is_dir():
            path = Path(self.name, self.subfolder, filename)
            return str(path) if path.is_file() else None
        try:
            if self._cached(filename) is _CACHED_NO_EXIST and not self.has_now(filename):
                return None
            return hf_hub_download(self.name, filename, **self.hub)
        except LocalEntryNotFoundError:
            raise
        except NOT_FOUND:
            return None

    def _cached(self, filename: str) -> Any:
        """A path in the cache, `_CACHED_NO_EXIST` if the repository had no such file, or None."""
        path = Path(self.subfolder, filename).as_posix()
        of_cache = self.hub.get("cache_dir"), self.hub.get("revision")
        try:
            return try_to_load_from_cache(self.name, path, *of_cache)
        except HFValidationError:
            return None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        path = Path(self.name, self.subfolder, "config.json")
        if not Path(self.name).is_dir():
            path = Path(hf_hub_download(self.name, "config.json", **self.hub))
        if not path.is_file():
            raise OSError(f"{self.name!r} {NOTHING}")
        return self.read(path)

    def check(self) -> None:
        """Reads the files that describe a model, and the headers of its weights."""
        folder = self.folder
        for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
            if any(path.match(pattern) for pattern in READERS):
                self.read(path)

    def read(self, path: Path) -> Any:
        """The content of a JSON or text file, or the headers of weights, unless it is damaged."""
        if path in self.contents:
            return self.contents[path]
        if not path.is_file():
            raise OSError(f"{str(path)!r} must be a file, and is none: {REMEDY}.")
        read = next(read for pattern, read in READERS.items() if path.match(pattern))
        try:
            self.contents[path] = read(path)
        except Exception as error:
            raise OSError(f"{str(path)!r} is damaged ({reason(error)}): {REMEDY}.") from error
        return self.contents[path]

    def adapter(self, folder: str = ADAPTER_FOLDER) -> str | None:
        """Path of a LoRA on this machine, by default the one beside a model; None if there is none.

        Raises:
            OSError: there is a part of one, without which the predictions would be others.
        """
        repository = self.inside(folder)
        found = [repository.find(file) for file in ADAPTER_FILES]
        if any(found) and None in found:
            raise OSError(
                f"`adapter` {str(Path(self.name, repository.subfolder))!r} lacks a part of a PEFT "
                f"adapter: `{ADAPTER_FILES[0]}` and `{ADAPTER_FILES[1]}` are needed."
            )
        return None if found[0] is None else str(Path(found[0]).parent)

    def refuse_adapter(self, adapter_kwargs: dict[str, Any] | None = None) -> None:
        """Raises a ValueError for a model beside which an adapter lies.

        transformers would load from the path or repository that the adapter's configuration names;
        its Auto classes have done so where they say it in `adapter_kwargs`.
        """
        followed = (adapter_kwargs or {}).get("_adapter_model_path")
        if followed or self.find("adapter_config.json") is not None:
            raise ValueError(
                f"{followed or self.name!r} holds an adapter (`adapter_config.json`), which names "
                "other weights than its own: load the model that it is for, and give it in a "
                "folder of its own as `adapter`."
            )


def locate(name: str, kwargs: dict[str, Any] | None = None) -> Repository:
    """The repository of a model: `name`, or the folder `model` of the pipeline that it holds.

    Raises:
        OSError: there is no configuration, or a file is damaged.
    """
    repository = Repository(name, kwargs)
    with explain_load_errors(repository):
        if repository.first("config.json", "model_index.json") == "model_index.json":
            repository = repository.inside("model")
        repository.config  # noqa: B018  (read here, where errors are explained)
    return repository


@contextmanager
def explain_load_errors(repository: Repository) -> Iterator[None]:
    """A door at which a library loads from a repository; one sentence where that fails.

    One thread loads at a time: transformers changes settings of the process meanwhile, as the
    default dtype and the functions of `torch.nn.init`.

    Raises:
        OSError: a file is damaged, or there is no such file or repository.
    """
    repository.check()
    try:
        with LOADING:
            yield
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        repository.check()  # with what was downloaded meanwhile
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(_explanation(repository, error)) from error


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


def _explanation(repository: Repository, error: BaseException) -> str:
    name, hub, chain = repository.name, repository.hub, [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    cached = "`local_files_only` is set" if hub.get("local_files_only") else "check the connection"
    for kinds, sentence in (
        (HFValidationError, "is neither a folder nor an id on the Hub: check the path."),
        (
            RevisionNotFoundError,
            f"has no revision {hub.get('revision')!r}: give a branch, a tag or a commit of that "
            "repository.",
        ),
        (
            (RepositoryNotFoundError, GatedRepoError),
            "is neither a folder nor a repository on the Hub that can be read: check the name, or "
            "give the `token` of somebody who may read it.",
        ),
        (
            LocalEntryNotFoundError,
            "is not a folder and could not be read from the Hub, and it is not in the cache: "
            f"{cached}.",
        ),
        (EntryNotFoundError, NOTHING),
    ):
        if any(isinstance(link, kinds) for link in chain):
            return f"{name!r} {sentence}"
    return f"{name!r} cannot be loaded: {reason(error)}."


def _object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, got {type(content).__name__}")
    return content


def _config(path: Path) -> dict[str, Any]:
    content = _object(path)
    for part in (content, *(v for v in content.values() if isinstance(v, dict))):
        for name, kind in TYPES.items():
            if not isinstance(part.get(name), kind | None):
                raise ValueError(f"`{name}` must be of type {kind.__name__}")
    return content


def _shards(path: Path) -> list[str]:
    """The files that an index of weights names."""
    names = _object(path).get("weight_map")
    named = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not named or any(Path(name).name != name for name in names.values()):
        raise ValueError("`weight_map` must give the file of each weight, beside it")
    return sorted(set(names.values()))


READERS = {
    "*.index*.json": _shards,
    "*config.json": _config,
    "model_index.json": _object,
    "tokenizer.json": _object,
    "*.jinja": lambda path: path.read_text("utf-8"),
    "*.safetensors": read_headers,
}
"""How files are read by the patterns of their names."""
