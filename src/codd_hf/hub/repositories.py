"""Folders and repositories on the Hub: their files, and one sentence where they cannot be read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm
from safetensors import safe_open

from ..checks.errors import is_of_a_library, reason
from ..configuration_codd import check_layers

CACHE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only")
HUB_ARGUMENTS = (*CACHE_ARGUMENTS, "revision", "token", "subfolder")
LOADING = RLock()
ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHECKED = ("config.json", "index.json", "tokenizer.json", ".jinja", ".safetensors")
"""Ends of the names of files that are read before a library meets them."""
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", f"*{ADAPTER_FILES[1]}")
"""Files of a repository that are downloaded at once; weights are when they are needed."""


class _NoBar(tqdm):  # of files that are there already, or in a moment
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


def shared_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` that concern every repository that is read."""
    return {key: kwargs[key] for key in (*CACHE_ARGUMENTS, "token") if key in kwargs}


def checked_name(name: Any, argument: str) -> str:
    """A path or id as a string; raises for anything else, and where a path leads to nothing."""
    if not isinstance(name, str | Path) or not str(name).strip():
        raise TypeError(f"`{argument}` must be a folder or an id on the Hub, got {name!r}.")
    if isinstance(name, str) and not _can_only_be_a_path(name):
        return name
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {str(name)!r}.")
    return str(path)


def is_local(name: str) -> bool:
    """Whether a name means something on this machine only."""
    return _can_only_be_a_path(name) or Path(name).exists()


def _can_only_be_a_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


class Repository:
    """A folder, or a repository on the Hub, which is a folder of the cache: all loads from there.

    Where the Hub cannot be reached, or refuses, its files are those in the cache.

    Args:
        name: a path or an id.
        kwargs: the arguments of a `from_pretrained`; `HUB_ARGUMENTS` among them count.

    Attributes:
        folder: the folder on this machine.

    Raises:
        OSError: there is no such repository, or neither it nor the cache can be reached.
    """

    def __init__(self, name: str, kwargs: dict[str, Any] | None = None) -> None:
        self.name = name
        self.hub = {key: value for key, value in (kwargs or {}).items() if key in HUB_ARGUMENTS}
        self.subfolder: str = self.hub.get("subfolder") or ""
        self.is_local = Path(name).exists()
        self.root = Path(name) if self.is_local else self._snapshot()
        self.folder = self.root / self.subfolder
        self.contents: dict[Path, Any] = {}

    def _snapshot(self) -> Path:
        where = {key: value for key, value in self.hub.items() if key != "subfolder"}
        patterns = [Path(self.subfolder, pattern).as_posix() for pattern in SMALL]
        try:
            found = snapshot_download(
                self.name,
                **where,
                allow_patterns=patterns,
                library_name="codd-hf",
                tqdm_class=_NoBar,
            )
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise OSError(
                f"{self.name!r} (revision {self.hub.get('revision') or 'main'!r}) is neither a "
                "folder nor a repository on the Hub that can be read: check the name, the "
                "`revision` and the `token`."
            ) from error
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"{self.name!r} is not in the cache: check the connection, or leave out "
                "`local_files_only`."
            ) from error
        return Path(found)

    def inside(self, folder: str) -> Repository:
        """A folder of the repository."""
        inner = copy.copy(self)
        inner.subfolder = Path(self.subfolder, folder).as_posix()
        inner.folder = self.root / inner.subfolder
        return inner

    def find(self, filename: str) -> Path | None:
        """Path of a file, if it is here."""
        path = self.folder / filename
        return path if path.is_file() else None

    def fetch(self, filename: str) -> Path | None:
        """Path of a file of any size, downloaded if need be; None if there is none."""
        found = self.find(filename)
        if found is not None or self.is_local:
            return found
        where = self.hub | {"revision": self.root.name, "subfolder": self.subfolder}
        try:
            return Path(hf_hub_download(self.name, filename, **where))
        except EntryNotFoundError:
            return None

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        path = self.find("config.json")
        if path is None:
            raise OSError(
                f"{self.name!r} holds no CoDD head, model or pipeline, nor a backbone: its "
                "configuration (`config.json`) is missing."
            )
        content = self.read(path)
        check_layers(content)
        return content

    def check(self) -> None:
        """Opens the files on this machine that a model is loaded from."""
        for path in sorted(self.folder.glob("*")):
            if path.name.endswith(CHECKED):
                self.read(path)

    def read(self, path: Path) -> Any:
        """The content of a file; of an index, the files that it names. Damage is an OSError."""
        if path not in self.contents:
            try:
                self.contents[path] = _content(path)
            except Exception as error:
                raise OSError(
                    f"{str(path)!r} is damaged ({reason(error)}): save it or download it again."
                ) from error
        return self.contents[path]

    def adapter(self, folder: str = ADAPTER_FOLDER) -> Path | None:
        """Path of a LoRA on this machine, by default the one beside a model; None if there is none.

        A part of one is an OSError: without the rest the predictions would be others.
        """
        repository = self.inside(folder)
        found = [repository.find(file) for file in ADAPTER_FILES]
        if any(found) and None in found:
            raise OSError(
                f"`adapter` {str(Path(self.name, repository.subfolder))!r} lacks a part of a PEFT "
                f"adapter: `{ADAPTER_FILES[0]}` and `{ADAPTER_FILES[1]}` are needed."
            )
        return repository.folder if any(found) else None

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
    """The repository of a model: `name`, or the folder `model` of the pipeline that it holds."""
    repository = Repository(name, kwargs)
    if repository.find("config.json") is None and repository.find("model_index.json"):
        repository = repository.inside("model")
    return repository


def default_model() -> str:
    """Path of the embedded pipeline: a 1 M-parameter diffusion LM of the package's small tasks.

    It holds `model/`, `scheduler/` and `tokenizer/`, and unseen tasks, in `test.jsonl`.
    """
    return str(Path(__file__).parents[1] / "default_model")


@contextmanager
def explain_load_errors(repository: Repository) -> Iterator[None]:
    """A door at which a library loads from a repository; one sentence where that fails.

    One thread loads at a time: transformers changes settings of the process meanwhile, as the
    default dtype and the functions of `torch.nn.init`.

    Raises:
        OSError: a file is damaged, or a library cannot load it.
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
        raise kind(f"{repository.name!r} cannot be loaded: {reason(error)}.") from error


@contextmanager
def reaching_hub() -> Iterator[None]:
    """Says in one sentence that the Hub cannot be reached; its own refusals pass as they are."""
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"The Hub cannot be reached ({reason(error)}): check the connection."
        ) from error


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            return None
    text = path.read_text("utf-8")
    if path.suffix == ".jinja":
        return text
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, got {type(content).__name__}")
    if ".index." not in path.name:
        return content
    files = sorted(set(content["weight_map"].values()))
    if any(Path(file).name != file for file in files):
        raise ValueError("`weight_map` must name files beside it")
    return files
