"""Whether stored weights are those that a configuration describes.

transformers fills in what a file lacks with fresh weights, passes over what it does not know, casts
what is of another kind, and allocates whatever a configuration says. But a model is nothing without
any of its weights, and a configuration that somebody else wrote must not decide how much memory is
taken. So what the headers of the files say is compared before anything is allocated, and what
transformers reports afterwards is an error.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_codd import MOST_LAYERS, CoDDHeadConfig, check_counts, one_sentence_for
from .repositories import find_file, hub_arguments

LISTED = 4
"""So many weights are named in an error."""
FEW_LAYERS = 1024
"""Models may have so many layers whatever their files hold: some share the weights of layers."""
FEW_ELEMENTS = 1 << 20
"""What is computed from a configuration, as tables of positions are, may be so large."""


class Header(NamedTuple):
    """A tensor of a file. `kind`: `floating-point`, `integer`, `boolean` or `complex`."""

    shape: tuple[int, ...]
    kind: str


class StoredWeights(NamedTuple):
    """The headers of a model's files, by the names of the weights, and the size of the files."""

    headers: dict[str, Header]
    num_bytes: int

    @classmethod
    def find(cls, name: str, kwargs: dict[str, Any]) -> StoredWeights | None:
        """Those that transformers would load.

        Args:
            name: a folder or an id on the Hub.
            kwargs: the arguments of a `from_pretrained`.

        Returns:
            None where there are none, or the arguments give weights in another way.

        Raises:
            OSError: a file is damaged, or names another one that is not there.
        """
        if any(kwargs.get(given) is not None for given in ("state_dict", "gguf_file")):
            return None
        hub, infix = hub_arguments(kwargs), ""
        if kwargs.get("variant") is not None:
            infix = f".{kwargs['variant']}"
        safe = kwargs.get("use_safetensors")
        stems = [] if safe is False else [("model", "safetensors")]
        stems += [] if safe else [("pytorch_model", "bin")]
        for stem, ending in stems:
            whole = find_file(name, f"{stem}{infix}.{ending}", **hub)
            if whole is not None:
                return cls.read([whole])
            index = find_file(name, f"{stem}.{ending}.index{infix}.json", **hub)
            if index is not None:
                shards = {shard: find_file(name, shard, **hub) for shard in _shards(index)}
                absent = [shard for shard, file in shards.items() if file is None]
                if absent:
                    raise OSError(
                        f"The weights in {name!r} lack the file {absent[0]!r} that "
                        f"`{Path(index).name}` names: download or save them again."
                    )
                return cls.read(shards.values())
        return None

    @classmethod
    def read(cls, files: Iterable[str]) -> StoredWeights:
        """The headers of files of either format; no weights are read."""
        headers, num_bytes = {}, 0
        for file in files:
            headers |= _safe_headers(file) if file.endswith("safetensors") else _headers(file)
            num_bytes += Path(file).stat().st_size
        return cls(headers, num_bytes)

    @property
    def num_elements(self) -> int:
        return sum(prod(header.shape) for header in self.headers.values())


def _shards(index: str) -> list[str]:
    """The files that an index names."""
    try:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        if all(Path(shard).name == shard for shard in shards):
            return sorted(shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise OSError(
        f"{index!r} is no index of weights (`weight_map` must give the file of each): download or "
        "save them again."
    )


def _safe_headers(file: str) -> dict[str, Header]:
    headers = {}
    with safe_open(file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (it cannot be iterated over)
            tensor = weights.get_slice(key)
            dtype = tensor.get_dtype()
            kinds = {"BOO": "boolean", "BF1": "floating-point"} | dict.fromkeys(
                ("C64", "C12"), "complex"
            )
            kind = kinds.get(dtype[:3], "floating-point" if dtype[0] == "F" else "integer")
            headers[key] = Header(tuple(tensor.get_shape()), kind)
    return headers


def _headers(file: str) -> dict[str, Header]:
    """Of a file that torch pickled; its weights are not read, nor is anything that it holds run."""
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


def check_head(name: str, config: CoDDHeadConfig, stored: StoredWeights, prefix: str) -> None:
    """Compares the stored weights of a head with its configuration.

    Args:
        name: the folder or id of the head, or of the model that has it.
        config: the head's configuration.
        stored: what is there.
        prefix: of the head's weights among those stored, `"coupling_head."` in a model.

    Raises:
        ValueError: a weight is missing, of another shape or of another kind.
    """
    from ..modeling_head import CoDDHead

    try:
        with torch.device("meta"):
            expected = CoDDHead(config).state_dict()
    except (RuntimeError, TypeError, OverflowError):  # sizes whose product is no number of bytes
        raise ValueError(
            f"The configuration of the head in {name!r} describes {config.num_latents:,} states "
            f"and {config.vocab_size:,} tokens, which are no weights that can be stored."
        ) from None
    for key, tensor in expected.items():
        wanted = Header(tuple(tensor.shape), _kind(tensor.dtype))
        found = stored.headers.get(prefix + key)
        if found != wanted:
            what = "missing"
            if found is not None:
                what = f"of shape {found.shape}"
                what += "" if found.kind == wanted.kind else f" and {found.kind}"
            raise ValueError(
                f"The weights of the head in {name!r} are not those that its configuration "
                f"describes: `{key}` must be of shape {wanted.shape} and {wanted.kind}, but is "
                f"{what}."
            )


def check_sizes(
    name: str,
    config: PreTrainedConfig,
    stored: StoredWeights | None,
    build: Callable[[PreTrainedConfig], nn.Module],
    key_mapping: dict[str, str] | None = None,
) -> None:
    """Raises unless the files of a model can hold what its configuration describes.

    Args:
        name: the folder or id of the model.
        config: its configuration.
        stored: what is there, if it can be read.
        build: makes a model of a configuration; it is called on the meta device.
        key_mapping: patterns of the names of the stored weights to replacements.

    Raises:
        ValueError: they cannot, or the configuration describes no model.
    """
    if stored is None:
        return
    with one_sentence_for(f"the configuration in {name!r}"), torch.device("meta"):
        model = build(copy.deepcopy(config))
    expected, headers = model.state_dict(), stored.headers
    for pattern, replacement in (key_mapping or {}).items():
        headers = {re.sub(pattern, replacement, key): header for key, header in headers.items()}
    packed = getattr(config, "quantization_config", None) is not None
    if not packed:
        _raise_for_sizes(
            name,
            [
                (key, headers[key].shape, tuple(tensor.shape))
                for key, tensor in expected.items()
                if key in headers and headers[key].shape != tuple(tensor.shape)
            ],
        )
        for key, tensor in expected.items():
            if key in headers and headers[key].kind != _kind(tensor.dtype):
                raise ValueError(
                    f"The weights in {name!r} are not those that its configuration describes: "
                    f"`{key}` must be {_kind(tensor.dtype)}, but is {headers[key].kind}."
                )
    # Tied weights are one parameter; a packed one is stored in a bit or more.
    computed = {id(buffer) for _, buffer in _computed_buffers(model)}
    needed = sum(t.numel() for t in model.parameters())
    needed += sum(b.numel() for b in model.buffers() if id(b) not in computed)
    held = 8 * stored.num_bytes if packed else stored.num_elements
    largest = max((b.numel() for _, b in _computed_buffers(model)), default=0)
    if needed > held:
        _raise_for_names(name, [key for key in expected if key not in headers], [])
    if needed > held or largest > held + FEW_ELEMENTS:
        raise ValueError(
            f"The configuration in {name!r} describes {max(needed, largest):,} weights, but its "
            f"files hold {held:,}: download or save them again."
        )


def _computed_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that are not stored."""
    stored = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in stored]


def check_layers(name: str, fields: dict[str, Any], stored: StoredWeights | None) -> None:
    """Raises for a `config.json` with more layers than the files can hold.

    To be asked before a configuration is made of it: transformers makes lists of so many entries.
    """
    most = MOST_LAYERS if stored is None else max(FEW_LAYERS, len(stored.headers))
    check_counts(fields, most, f"in the configuration of {name!r}, whose files hold no more")


def check_report(
    name: str, report: dict[str, Any], sizes_may_differ: bool = False, unused: str | None = None
) -> None:
    """Raises where transformers has loaded other weights than a model has.

    Args:
        name: the folder or id of the model.
        report: as `from_pretrained` returns it with `output_loading_info=True`.
        sizes_may_differ: whether the user asked for `ignore_mismatched_sizes`.
        unused: a pattern of names of weights that the model may leave aside.

    Raises:
        ValueError: weights are missing, of other shapes, or more than the model has.
    """
    if not sizes_may_differ:
        _raise_for_sizes(name, sorted(report["mismatched_keys"]))
    unexpected = sorted(report["unexpected_keys"])
    if unused is not None:
        unexpected = [key for key in unexpected if not re.search(unused, key)]
    _raise_for_names(name, sorted(report["missing_keys"]), unexpected)


def _raise_for_sizes(name: str, found: list[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    if found:
        shapes = [f"`{k}` is {tuple(a)} and must be {tuple(b)}" for k, a, b in found]
        raise ValueError(
            f"The weights in {name!r} are not of the shapes that its configuration "
            f"(`config.json`) describes: {_some(shapes)}."
        )


def _raise_for_names(name: str, missing: list[str], unexpected: list[str]) -> None:
    parts = [
        f"{_some([f'`{key}`' for key in keys])} {what}"
        for keys, what in ((missing, "missing"), (unexpected, "in no place of the model"))
        if keys
    ]
    if parts:
        raise ValueError(
            f"The weights in {name!r} are not those that its configuration (`config.json`) "
            f"describes: {' and '.join(parts)}."
        )


def _some(texts: list[str]) -> str:
    more = len(texts) - LISTED
    return ", ".join(texts[:LISTED]) + (f" and {more} more" if more > 0 else "")
