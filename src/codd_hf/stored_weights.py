"""Whether the weights of a head that is stored are those that its configuration describes.

transformers fills in what a file lacks with fresh weights, and allocates them whatever their size.
A head is nothing without any of its weights, and a configuration that somebody else wrote must not
decide how much memory is taken. So the shapes are compared before anything is allocated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .configuration_codd import CoDDHeadConfig
from .repositories import find_file, hub_arguments

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_weights(name: str, config: CoDDHeadConfig, kwargs: dict[str, Any], prefix: str) -> None:
    """Compares the stored weights of a head with its configuration; reads no weights.

    What is not stored as `model.safetensors` (whole or sharded) is left to transformers.

    Args:
        name: the folder or id of the head, or of the model that has it.
        config: the head's configuration.
        kwargs: the arguments of a `from_pretrained`.
        prefix: of the head's weights among those stored, `"coupling_head."` in a model.

    Raises:
        ValueError: a weight is missing or of another shape.
    """
    from .modeling_head import CoDDHead

    other = ("variant", "use_safetensors", "state_dict", "ignore_mismatched_sizes")
    if any(kwargs.get(argument) is not None for argument in other):
        return
    stored = _stored_shapes(name, kwargs, prefix)
    if stored is None:
        return
    try:
        with torch.device("meta"):
            expected = {k: tuple(t.shape) for k, t in CoDDHead(config).state_dict().items()}
    except RuntimeError:  # sizes whose product is no number of bytes
        raise ValueError(
            f"The configuration of the head in {name!r} describes {config.num_latents:,} states "
            f"and {config.vocab_size:,} tokens, which are no weights that can be stored."
        ) from None
    for key, shape in expected.items():
        if stored.get(key) != shape:
            found = f"of shape {stored[key]}" if key in stored else "missing"
            raise ValueError(
                f"The weights of the head in {name!r} are not those that its configuration "
                f"describes: `{key}` must be of shape {shape}, but is {found}."
            )


def _stored_shapes(
    name: str, kwargs: dict[str, Any], prefix: str
) -> dict[str, tuple[int, ...]] | None:
    hub = hub_arguments(kwargs)
    whole = find_file(name, FILE, **hub)
    if whole is not None:
        files = [whole]
    elif (index := find_file(name, INDEX, **hub)) is not None:
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {file for key, file in shards.items() if key.startswith(prefix)}
        files = [file for shard in names if (file := find_file(name, shard, **hub)) is not None]
    else:
        return None
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (it cannot be iterated over)
                if key.startswith(prefix):
                    shape = weights.get_slice(key).get_shape()
                    shapes[key.removeprefix(prefix)] = tuple(shape)
    return shapes
