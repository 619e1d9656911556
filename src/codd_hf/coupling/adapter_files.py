"""Adapters on disk, in PEFT's format."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from ..hub.repositories import ADAPTER_FILES, Repository, checked_name
from .adapter_settings import CHANGING_STARTS, PATTERNS, check_adapter_settings
from .adapters import (
    active_adapter,
    active_state,
    adapter_layers,
    adapter_state_dict,
    add_adapter,
    delete_adapter,
    lora_layers,
    refuse_changes,
    restore,
    starts_of,
)

PREFIX = "base_model.model."
"""PEFT puts it before the names of stored weights."""


def load_adapter(
    backbone: nn.Module,
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
        start_is_off: whether the backbone's weights are those beside which it was trained; else a
            start that was taken off them (PiSSA, OLoRA) is taken off now, as PEFT does.
        shared: whether the backbone serves other heads, which need its weights as they are.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

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
    used = check_adapter_settings(repository.read(settings), stored=True)
    if any(header.kind != "floating-point" for header in repository.read(weights).values()):
        raise ValueError(f"`adapter` {source!r} must hold floats alone.")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(weights).items()}
    ranks = _stored_ranks(state)
    if any(isinstance(used.get(field), str) for field in PATTERNS):  # no pattern of a file is run
        used |= {"target_modules": sorted(ranks), "exclude_modules": None}
        used |= {"layers_to_transform": None, "layers_pattern": None}
    used = {field: value for field, value in used.items() if value is not None}
    misfit = ValueError(
        f"`adapter` {source!r} was not trained on a backbone like this one: its weights do not "
        "fit. (One of a whole CoDD model is loaded by `peft.PeftModel.from_pretrained(model, "
        "adapter)`.)"
    )
    if _wanted_layers(backbone, used) != ranks.keys():
        raise misfit
    _check_ranks(used, ranks)
    start = used.pop("init_lora_weights", True)
    takes_start_off = start in CHANGING_STARTS and not start_is_off
    if takes_start_off and (shared or starts_of(backbone)):
        refuse_changes([start])
    before, own = active_state(backbone), {id(p) for p in backbone.parameters()}
    add_adapter(backbone, peft.LoraConfig(**used, inference_mode=True), name)
    added = {key: p for key, p in backbone.named_parameters() if id(p) not in own}
    try:
        _fill(backbone, name, state, added)
    except (KeyError, RuntimeError, ValueError) as error:  # other shapes or names
        delete_adapter(backbone, name)
        restore(backbone, before)
        raise misfit from error
    if takes_start_off:
        for layer in lora_layers(backbone, name).values():
            layer.olora_init(name) if start == "olora" else layer.pissa_init(name, start)
        _fill(backbone, name, state, added)
    backbone.peft_config[name].init_lora_weights = start
    for parameter in added.values():
        parameter.requires_grad_(False)


def _fill(backbone: nn.Module, name: str, state: dict[str, Any], added: dict[str, Any]) -> None:
    found = peft.set_peft_model_state_dict(backbone, state, name)
    if wrong := [*found.unexpected_keys, *(set(found.missing_keys) & added.keys())]:
        raise ValueError(f"Weights that are missing, or that no layer has: {wrong[:3]}.")


def _stored_ranks(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """The layers that stored weights are of, and their ranks."""
    ranks = {}
    for key, tensor in state.items():
        layer, dot, part = key.rpartition(".lora_")
        if dot and part in ("A.weight", "embedding_A"):
            ranks[layer] = len(tensor) if tensor.ndim else 0
    return ranks


def _wanted_layers(backbone: nn.Module, used: dict[str, Any]) -> set[str]:
    """The layers that PEFT would adapt by these settings."""
    config = SimpleNamespace(target_parameters=None, **used)
    names = (name for name, _ in backbone.named_modules())
    return {name for name in names if check_target_module_exists(config, name)}


def _check_ranks(used: dict[str, Any], ranks: dict[str, int]) -> None:
    """Refuses other ranks than those of the stored weights, before PEFT allocates them."""
    of_layers = used.get("rank_pattern", {})
    for layer, stored in ranks.items():
        rank = of_layers.get(get_pattern_key(of_layers.keys(), layer), used.get("r", 8))
        if rank != stored:
            raise ValueError(
                f"`r` or `rank_pattern` of an adapter must be the rank of its stored weights, "
                f"{stored} in {layer!r}, got {rank}."
            )


def save_adapter(model: nn.Module, folder: str | Path, base: str | None) -> None:
    """Writes the active adapter of a [`CoDDModel`], or removes one that was written before."""
    name = active_adapter(model)
    if name is not None:
        write_adapter(model.backbone, name, folder, base)
        return
    for file in ADAPTER_FILES:
        Path(folder, file).unlink(missing_ok=True)


def write_adapter(backbone: nn.Module, name: str, folder: str | Path, base: str | None) -> None:
    """Writes an adapter in PEFT's format, with names in place of patterns.

    Args:
        backbone: carries it.
        name: the adapter.
        folder: receives the files.
        base: the path or id of the backbone, for the adapter's configuration.
    """
    config, layers = copy.deepcopy(backbone.peft_config[name]), lora_layers(backbone, name)
    ends = {layer.rpartition(".")[2] for layer in layers}
    alike = {n for n, _ in backbone.named_modules() if n.rpartition(".")[2] in ends}
    config.target_modules = sorted(layers if alike - layers.keys() else ends)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    ranks = {key: layer.r[name] for key, layer in layers.items()}
    alphas = {key: layer.lora_alpha[name] for key, layer in layers.items()}
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: a for key, a in alphas.items() if a != config.lora_alpha}
    in_full = (
        key
        for key, layer in adapter_layers(backbone).items()
        if name in getattr(layer, "modules_to_save", ())
    )
    config.modules_to_save = sorted(in_full) or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    state = adapter_state_dict(backbone, name)
    weights = {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, Path(folder, ADAPTER_FILES[1]), metadata={"format": "pt"})
