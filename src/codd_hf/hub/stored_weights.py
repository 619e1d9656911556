"""Whether stored weights are those that a configuration describes.

transformers draws the weights that a file lacks, passes over those that it does not know, casts
those of another kind, and allocates whatever a configuration says. A model is nothing without any
of its weights, and a configuration that somebody else wrote must not decide how much memory is
taken. So the headers of the files are compared before anything is allocated, and what transformers
reports afterwards is an error.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_codd import MOST_LAYERS, check_counts, one_sentence_for

if TYPE_CHECKING:
    from .repositories import Repository

FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
LISTED = 4
"""So many weights are named in an error."""
FEW_LAYERS = 1024
"""Models may have so many layers whatever their files hold: some share the weights of layers."""
FEW_ELEMENTS = 1 << 20
"""So many elements may be computed from a configuration, as tables of positions are."""


class Header(NamedTuple):
    """A tensor of a file; its `kind` is `floating-point`, `integer`, `boolean` or `complex`."""

    shape: tuple[int, ...]
    kind: str


class StoredWeights(NamedTuple):
    """The weights that transformers would load.

    Attributes:
        name: the folder or id of the model.
        headers: by the names of the weights; None where no files are there to be read.
        num_bytes: the size of the files.
    """

    name: str
    headers: dict[str, Header] | None
    num_bytes: int = 0

    @classmethod
    def find(cls, repository: Repository, kwargs: dict[str, Any]) -> StoredWeights:
        """Reads the headers; `kwargs` are the arguments of a `from_pretrained`.

        Raises:
            OSError: a file is damaged, or names another one that is not there.
        """
        safe, variant = kwargs.get("use_safetensors"), kwargs.get("variant")
        infix = "" if variant is None else f".{variant}"
        for stem, ending in FORMATS if kwargs.get("gguf_file") is None else ():
            if safe is not None and safe != (ending == "safetensors"):
                continue
            index, files = None, {f"{stem}{infix}.{ending}": None}
            if repository.find(*files) is None:
                index = repository.find(f"{stem}.{ending}.index{infix}.json")
                if index is None:
                    continue
                files = dict.fromkeys(repository.read(Path(index)))
            headers, num_bytes = {}, 0
            for file in files:
                path = repository.find(file)
                if path is None:
                    raise OSError(
                        f"{index!r} names the file {file!r}, which is not beside it: save it or "
                        "download it again."
                    )
                safe_file = ending == "safetensors"
                headers |= repository.read(Path(path)) if safe_file else read_pickled(path)
                num_bytes += Path(path).stat().st_size
            return cls(repository.name, headers, num_bytes)
        return cls(repository.name, None)

    def check_layers(self, fields: dict[str, Any]) -> None:
        """Raises for the content of a `config.json` with more layers than the files can hold.

        To be asked before a configuration is made of it: transformers makes lists of the layers.
        """
        most = MOST_LAYERS if self.headers is None else max(FEW_LAYERS, len(self.headers))
        where = f"in the configuration of {self.name!r}, whose files hold no more"
        check_counts(fields, most, where)

    def load(
        self,
        load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
        config: PreTrainedConfig | None,
        build: Callable[[PreTrainedConfig], PreTrainedModel] | None,
        /,
        unused: str | None = None,
        may_lack: bool = False,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Loads the weights, all of them and no others, or raises.

        Args:
            load: transformers' `from_pretrained`.
            config: the configuration.
            build: makes a model of a configuration; it is called on the meta device. None where the
                class is known only as it is loaded.
            unused: a pattern of the names of weights that the model may leave aside.
            may_lack: whether the model may have weights that are not stored.
            **kwargs: for `load`, its own `config` among them.

        Returns:
            The model, and the report of transformers.

        Raises:
            ValueError: weights are missing, of other shapes or kinds, or more than the model has,
                or the configuration describes no model.
        """
        sizes_may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        if build is not None and self.headers is not None and not sizes_may_differ:
            with one_sentence_for(f"the configuration in {self.name!r}"), torch.device("meta"):
                model = build(copy.deepcopy(config))
            self._check_sizes(model, kwargs.get("key_mapping") or {})
        # Other sizes pass here: they are told with all else that the report holds.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = load(self.name, **kwargs)
        if not sizes_may_differ:
            self._refuse_shapes(sorted(report["mismatched_keys"]))
        unexpected = sorted(report["unexpected_keys"])
        if unused is not None:
            unexpected = [key for key in unexpected if not re.search(unused, key)]
        self._refuse_names([] if may_lack else sorted(report["missing_keys"]), unexpected)
        return model, report

    def _check_sizes(self, model: PreTrainedModel, key_mapping: dict[str, str]) -> None:
        """Raises unless the files can hold a model on the meta device."""
        packed = getattr(model.config, "quantization_config", None) is not None
        expected, headers = model.state_dict(), self.headers
        for pattern, replacement in key_mapping.items():
            headers = {re.sub(pattern, replacement, key): header for key, header in headers.items()}
        both = [] if packed else [key for key in expected if key in headers]
        shapes = [(key, headers[key].shape, tuple(expected[key].shape)) for key in both]
        self._refuse_shapes([found for found in shapes if found[1] != found[2]])
        for key in both:
            if headers[key].kind != (kind := _kind(expected[key].dtype)):
                self._refuse(f"`{key}` must be {kind}, but is {headers[key].kind}")
        # Tied weights are one parameter; a packed one is stored in a bit or more.
        buffers = dict(model.named_buffers())
        computed = [buffer.numel() for name, buffer in buffers.items() if name not in expected]
        needed = sum(weight.numel() for weight in model.parameters())
        needed += sum(buffer.numel() for buffer in buffers.values()) - sum(computed)
        stored = sum(prod(header.shape) for header in headers.values())
        held, largest = 8 * self.num_bytes if packed else stored, max(computed, default=0)
        if needed > held:
            self._refuse_names([key for key in expected if key not in headers], [])
        if needed > held or largest > held + FEW_ELEMENTS:
            raise ValueError(
                f"The configuration in {self.name!r} describes {max(needed, largest):,} weights, "
                f"but its files hold {held:,}: download or save them again."
            )

    def _refuse_shapes(self, found: list[tuple[str, Iterable[int], Iterable[int]]]) -> None:
        if found:
            self._refuse(_some(f"`{k}` is {tuple(a)} and must be {tuple(b)}" for k, a, b in found))

    def _refuse_names(self, missing: list[str], unexpected: list[str]) -> None:
        named = ((missing, "missing"), (unexpected, "in no place of the model"))
        parts = [f"{_some(f'`{key}`' for key in keys)} {what}" for keys, what in named if keys]
        if parts:
            self._refuse(" and ".join(parts))

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"The weights in {self.name!r} are not those that its configuration (`config.json`) "
            f"describes: {what}."
        )


def read_headers(path: Path) -> dict[str, Header]:
    """The headers of a safetensors file."""
    headers = {}
    with safe_open(path, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (it cannot be iterated over)
            tensor = weights.get_slice(key)
            dtype = tensor.get_dtype()
            kinds = {"BOO": "boolean", "BF1": "floating-point", "C64": "complex", "C12": "complex"}
            kind = kinds.get(dtype[:3], "floating-point" if dtype[0] == "F" else "integer")
            headers[key] = Header(tuple(tensor.get_shape()), kind)
    return headers


def read_pickled(file: str) -> dict[str, Header]:
    """The headers of a file that torch pickled, unless it holds more than weights; none is run."""
    try:
        weights = torch.load(file, map_location="meta", weights_only=True)
        tensors = {key: t for key, t in weights.items() if isinstance(t, torch.Tensor)}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise OSError(
            f"The weights in {file!r} are damaged, or hold more than weights: save them as "
            "safetensors."
        ) from error
    if sum(t.numel() * t.itemsize for t in tensors.values()) > Path(file).stat().st_size:
        raise OSError(f"The weights in {file!r} are larger than their file: save them again.")
    return {key: Header(tuple(t.shape), _kind(t.dtype)) for key, t in tensors.items()}


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "boolean"
    if dtype.is_complex:
        return "complex"
    return "floating-point" if dtype.is_floating_point else "integer"


def _some(texts: Iterable[str]) -> str:
    texts = [*texts]
    more = len(texts) - LISTED
    return ", ".join(texts[:LISTED]) + (f" and {more} more" if more > 0 else "")
