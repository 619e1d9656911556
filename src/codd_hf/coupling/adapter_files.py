"""Adapters on disk, in PEFT's format."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import torch
from peft import functional
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..checks.errors import reason
from ..hub.repositories import ADAPTER_FILES, Repository, checked_name
from .adapters import (
    PISSA,
    active_state,
    adapter_configs,
    adapter_layers,
    adapter_state_dict,
    add_adapter,
    delete_adapter,
    lora_layers,
    refuse_pissa,
    switch,
    taken_settings,
)

PREFIX = "base_model.model."
"""PEFT puts it before the names of stored weights."""
NAMES = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
A_NAME = re.compile(r"\^?[\w.-]+")


def load_adapter(
    backbone: PreTrainedModel,
    adapter: str | Path,
    name: str,
    *,
    start_is_off: bool = False,
    shared: bool = False,
    **hub: Any,
) -> None:
    """Loads a PEFT adapter into a backbone, where it is active and frozen.

    Args:
        backbone: the model that the adapter was trained on.
        adapter: a folder or an id on the Hub, of the adapter or of a head that has one beside it.
        name: the name that it gets.
        start_is_off: whether the backbone's weights are those beside which it was trained; else the
            start of PiSSA is taken off them now, as PEFT does.
        shared: whether the backbone serves other heads, which need its weights as they are.
        **hub: where to load from.

    Raises:
        OSError: there is no adapter, or it is damaged.
        ValueError: it was not trained on a backbone like this one, or is of an unsupported kind.
    """
    source = checked_name(adapter, "adapter")
    repository = Repository(source, hub)
    folder = repository.adapter() or repository.adapter("")
    if folder is None:
        raise OSError(f"`adapter` {source!r} holds no PEFT adapter: {ADAPTER_FILES} are needed.")
    settings, weights = (Path(folder, file) for file in ADAPTER_FILES)
    repository.read(weights)
    state = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(weights).items()}
    if not all(tensor.is_floating_point() for tensor in state.values()):
        raise ValueError(f"`adapter` {source!r} must hold floats alone.")
    used = _stored_settings(repository.read(settings), state)
    start = used.pop("init_lora_weights", True)
    before, others = active_state(backbone), [*adapter_configs(backbone)]
    takes_start_off = start == PISSA and not start_is_off
    if takes_start_off and (shared or others):
        refuse_pissa(peft.LoraConfig(init_lora_weights=start))
    try:
        # Empty, so that its settings cannot ask for more memory than its weights take.
        config = peft.LoraConfig(**used, inference_mode=True)
        add_adapter(backbone, config, name, empty=True)
        found: Any = peft.set_peft_model_state_dict(backbone, state, name, low_cpu_mem_usage=True)
        missing = [key for key, parameter in backbone.named_parameters() if parameter.is_meta]
        if wrong := [*found.unexpected_keys, *missing]:
            raise ValueError(f"weights that are missing, or that no layer has: {wrong[:3]}")
    except Exception as error:
        if name in adapter_configs(backbone).keys() - others:
            delete_adapter(backbone, name)
        switch(backbone, *before)
        raise ValueError(
            f"`adapter` {source!r} was not trained on a backbone like this one: {reason(error)}. "
            "(One of a whole CoDD model is loaded by `peft.PeftModel.from_pretrained(model, ...)`.)"
        ) from error
    if takes_start_off:
        for layer in lora_layers(backbone, name).values():
            layer.pissa_init(name, start)
    functional.cast_adapter_dtype(backbone, name)
    peft.set_peft_model_state_dict(backbone, state, name)  # in float32
    config.init_lora_weights = start


def _stored_settings(settings: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The settings of a file; patterns, which can take for ever, give way to the weights' names."""
    used = {name: value for name, value in taken_settings(settings).items() if value is not None}
    for name in NAMES:
        named = used.get(name, ())
        for part in [named] if isinstance(named, str) else named:
            if not A_NAME.fullmatch(part):
                raise ValueError(
                    f"`{name}` of an adapter in a file must be of names, without patterns, got "
                    f"{part!r:.80}."
                )
    if any(isinstance(used.get(name), str) for name in ("target_modules", "exclude_modules")):
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            used.pop(name, None)
        used["target_modules"] = {key.rpartition(".lora_")[0] for key in state if ".lora_" in key}
    return used


def save_adapter(
    backbone: PreTrainedModel, name: str | None, folder: str | Path, base: str | None
) -> None:
    """Writes an adapter of a backbone (`base`) in PEFT's format, with names in place of patterns.

    Without a `name`, removes one that was written before.
    """
    if name is None:
        for file in ADAPTER_FILES:
            Path(folder, file).unlink(missing_ok=True)
        return
    config = copy.deepcopy(adapter_configs(backbone)[name])
    layers = lora_layers(backbone, name)
    ends = {layer.rpartition(".")[2] for layer in layers}
    alike = {n for n, _ in backbone.named_modules() if n.rpartition(".")[2] in ends}
    config.target_modules = sorted(layers if alike - layers.keys() else ends)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    ranks = {key: layer.r[name] for key, layer in layers.items()}
    alphas = {key: layer.lora_alpha[name] for key, layer in layers.items()}
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: a for key, a in alphas.items() if a != config.lora_alpha}
    wholes = {k: getattr(m, "modules_to_save", ()) for k, m in adapter_layers(backbone).items()}
    config.modules_to_save = sorted(k for k, adapters in wholes.items() if name in adapters) or None
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    state = adapter_state_dict(backbone, name)
    weights = {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, Path(folder, ADAPTER_FILES[1]), metadata={"format": "pt"})
