"""Whether stored weights are those that a configuration describes.

transformers draws the weights that a file lacks, passes over those that it does not know, and
allocates whatever a configuration says. A model is nothing without any of its weights, and a
configuration that somebody else wrote must not decide how much memory is taken. So sizes are
compared before anything is allocated, and what transformers reports afterwards is an error.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from .repositories import HUB_ARGUMENTS, Repository

FILES = ("model.safetensors", "pytorch_model.bin")
LISTED = 4
"""So many weights are named in an error."""
FEW_ELEMENTS = 1 << 20
"""So many elements may be computed from a configuration, as tables of positions are."""


def load_stored(
    repository: Repository,
    load: Callable[..., Any],
    config: PreTrainedConfig | None,
    build: Callable[..., PreTrainedModel] | None,
    /,
    unused: str | None = None,
    may_lack: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads a model with all the weights of a repository and no others, or raises.

    Args:
        repository: holds the weights.
        load: transformers' `from_pretrained`.
        config: the configuration.
        build: makes a model of a configuration; it is called on the meta device. None where the
            class is known only as it is loaded.
        unused: a pattern of the names of weights that the model may leave aside.
        may_lack: whether the model may have weights that are not stored.
        **kwargs: for `load`, its own `config` among them.

    Raises:
        ValueError: the weights are others, or an adapter lies beside them.
    """
    repository.refuse_adapter(kwargs.get("adapter_kwargs"))
    name, sizes_may_differ = repository.name, kwargs.get("ignore_mismatched_sizes", False)
    files, empty = _weight_files(repository), None
    if build is not None and files and not sizes_may_differ:
        with torch.device("meta"):
            empty = build(copy.deepcopy(config))
        _check_sizes(empty, name, sum(file.stat().st_size for file in files))
    # Other sizes pass here: they are told with all else that the report holds.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    kwargs["trust_remote_code"] = False  # whatever the caller asks for, no code is loaded
    others = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
    try:
        model, report = load(str(repository.folder), **others)
    except RuntimeError:  # weights that could not be fused or split, of which only a log tells
        if empty is not None and files[0].suffix == ".safetensors":
            _refuse(name, **_differences(empty, files, kwargs.get("key_mapping")))
        raise
    model.name_or_path = model.config.name_or_path = name
    shapes = [] if sizes_may_differ else sorted(report["mismatched_keys"])
    unexpected = [k for k in sorted(report["unexpected_keys"]) if not re.search(unused or "$.", k)]
    missing = [] if may_lack else sorted(report["missing_keys"])
    _refuse(name, shapes, missing, unexpected)
    return model


def _refuse(
    name: str, shapes: list[tuple[str, Any, Any]], missing: list[str], unexpected: list[str]
) -> None:
    """Raises for weights of other shapes (name, stored and wanted), missing and unexpected ones."""
    for fault, weights in (
        ("of another shape", [f"{k} {tuple(a)}, not {tuple(b)}" for k, a, b in shapes]),
        ("missing", missing),
        ("in no place of the model", unexpected),
    ):
        if weights:
            more = f" and {len(weights) - LISTED} more" if len(weights) > LISTED else ""
            raise ValueError(
                f"The weights in {name!r} are not those that its configuration (`config.json`) "
                f"describes: {', '.join(weights[:LISTED])}{more} {fault}."
            )


def _differences(
    model: Any, files: list[Path], key_mapping: dict[str, str] | None
) -> dict[str, list[Any]]:
    """How the weights in safetensors files differ from those that a model would be saved as."""
    model._weight_conversions = get_model_conversion_mapping(model, key_mapping, add_legacy=False)
    saved: Any = revert_weight_conversion(model, model.state_dict())
    wanted = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            stored |= {key: tuple(weights.get_slice(key).get_shape()) for key in names}
    both = sorted(wanted.keys() & stored.keys())
    return {
        "shapes": [(key, stored[key], wanted[key]) for key in both if stored[key] != wanted[key]],
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - wanted.keys()),
    }


def _weight_files(repository: Repository) -> list[Path]:
    """The files with weights, which are here then; none without the usual names."""
    for file in FILES:
        index = None if repository.find(file) else repository.find(f"{file}.index.json")
        names = [file] if index is None else repository.read(index)
        paths = {name: repository.fetch(name) for name in names}
        for name, path in paths.items():
            if path is None and index is not None:
                raise OSError(
                    f"{str(index)!r} names the file {name!r}, which is not beside it: save it or "
                    "download it again."
                )
        if all(paths.values()):
            return [path for path in paths.values() if path]
    return []


def _check_sizes(model: PreTrainedModel, name: str, num_bytes: int) -> None:
    """Raises unless files of so many bytes can hold a model on the meta device."""
    stored = {id(weight): weight for weight in model.state_dict(keep_vars=True).values()}
    needed = sum(weight.numel() for weight in stored.values())  # tied ones once
    computed = max((b.numel() for b in model.buffers() if id(b) not in stored), default=0)
    packed = getattr(model.config, "quantization_config", None) is not None
    held = num_bytes * (8 if packed else 1)  # a weight takes a byte, or packed a bit
    if needed > held or computed > held + FEW_ELEMENTS:
        raise ValueError(
            f"The configuration in {name!r} describes {max(needed, computed):,} weights, but its "
            f"files have {num_bytes:,} bytes: download or save them again."
        )
