"""Adapters on disk, in PEFT's format."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from ..hub.repositories import ADAPTER_FILES
from .adapter_settings import CHANGING_STARTS, check_adapter_settings
from .adapters import (
    active_adapter,
    active_state,
    adapter_layers,
    adapter_state_dict,
    add_adapter,
    check_room_for,
    delete_adapter,
    lora_layers,
    restore,
)

PREFIX = "base_model.model."
"""What PEFT puts before the names of stored weights."""


def read_adapter(
    backbone: nn.Module, folder: str | Path, name: str, source: str, *, start_is_off: bool = False
) -> None:
    """Puts a stored adapter on a backbone, where it is active and frozen.

    Args:
        backbone: what the adapter was trained on.
        folder: holds the files, which are whole (`check_files`).
        name: what it is called.
        source: what the user gave, for errors.
        start_is_off: whether the backbone's weights are those beside which it was trained; else a
            start that was taken off them (PiSSA, OLoRA) becomes a part of the adapter, and they
            stay as they are.

    Raises:
        ValueError: the adapter is of a kind that is not supported, or of another backbone.
    """
    check_room_for(backbone, name)
    settings = json.loads(Path(folder, ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    stored = load_file(Path(folder, ADAPTER_FILES[1]))
    state = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}
    used = check_adapter_settings(settings, stored=True)
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"`adapter` {source!r} must hold floats, got {tensor.dtype} in {key!r}."
            )
    if any(isinstance(used.get(field), str) for field in ("target_modules", "exclude_modules")):
        used |= {"target_modules": sorted(_ranks(state)), "exclude_modules": None}
        used |= {"layers_to_transform": None, "layers_pattern": None}
    start = used.get("init_lora_weights", True)
    used = {field: value for field, value in used.items() if value is not None}
    misfit = (
        f"`adapter` {source!r} was not trained on a backbone like this one: its weights do not "
        "fit. (One of a whole CoDD model is loaded by `peft.PeftModel.from_pretrained(model, "
        "adapter)`.)"
    )
    _check_sizes(backbone, used, state, misfit)
    for layer in _ranks(state):
        needs_base = start in CHANGING_STARTS or used.get("use_dora") or "modules_to_save" in used
        needs_base = needs_base or f"{layer}.lora_embedding_A" in state
        if needs_base and backbone.get_submodule(layer).weight.is_meta:
            raise ValueError(
                f"`adapter` {source!r} is not plain LoRA on linear layers, which is all that can "
                f"go on offloaded ones as {layer!r}: load the backbone without `device_map`."
            )
    used |= {"init_lora_weights": True, "inference_mode": True}
    config = peft.LoraConfig(**used)
    before = active_state(backbone)
    own = {id(parameter) for parameter in backbone.parameters()}
    try:
        whole = start in CHANGING_STARTS and not start_is_off
        add_adapter(backbone, config, name, to_be_filled=not whole)
        if whole:
            config = _with_start(backbone, name, start, state)
            delete_adapter(backbone, name)
            add_adapter(backbone, config, name)
        added = {key: p for key, p in backbone.named_parameters() if id(p) not in own}
        found = peft.set_peft_model_state_dict(backbone, state, name)
        if wrong := [*found.unexpected_keys, *(set(found.missing_keys) & added.keys())]:
            raise ValueError(f"Weights that are missing, or that no layer has: {wrong[:3]}.")
    except (KeyError, RuntimeError, ValueError) as error:  # other shapes or names
        if name in getattr(backbone, "peft_config", {}):
            delete_adapter(backbone, name)
        restore(backbone, before)
        raise ValueError(misfit) from error
    if start in CHANGING_STARTS and start_is_off:
        backbone.peft_config[name].init_lora_weights = start
    for parameter in added.values():
        parameter.requires_grad_(False)


def _ranks(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """The layers that stored weights are of, and their ranks."""
    ranks = {}
    for key, tensor in state.items():
        layer, dot, part = key.rpartition(".lora_")
        if dot and part in ("A.weight", "embedding_A"):
            ranks[layer] = len(tensor) if tensor.ndim else 0
    return ranks


def _check_sizes(
    backbone: nn.Module, used: dict[str, Any], state: dict[str, torch.Tensor], misfit: str
) -> None:
    """Refuses other layers or ranks than those of the stored weights, before PEFT allocates them.

    Raises:
        ValueError: there are; with the text of `misfit`, if other layers are wanted.
    """
    ranks, wanted = _ranks(state), SimpleNamespace(target_parameters=None, **used)
    layers = [name for name, _ in backbone.named_modules()]
    if {name for name in layers if check_target_module_exists(wanted, name)} != ranks.keys():
        raise ValueError(misfit)
    of_layers = used.get("rank_pattern", {})
    for layer, stored in ranks.items():
        rank = of_layers.get(get_pattern_key(of_layers.keys(), layer), used.get("r", 8))
        if rank != stored:
            raise ValueError(
                f"`r` or `rank_pattern` of an adapter must be the rank of its stored weights, "
                f"{stored} in {layer!r}, got {rank}."
            )


def _with_start(backbone: nn.Module, name: str, start: str, state: dict) -> Any:
    """Writes an adapter as what it adds to the weights that its start was taken off.

    From `W = W_rest + s B_0 A_0` it follows that `W_rest + s B A = W + s (B A - B_0 A_0)`: a LoRA
    of twice the rank, `[A; A_0]` and `[B, -B_0]`, on weights that stay as they are. (So does PEFT
    itself, if it is given `A_0` and `B_0`.)

    Args:
        backbone: carries the adapter, with weights that do not matter.
        name: the adapter.
        start: a value of `init_lora_weights`.
        state: its stored weights, which are changed.

    Returns:
        The new configuration.
    """
    for key, layer in lora_layers(backbone, name).items():
        weight = layer.get_base_layer().weight
        kept = weight.detach().clone()
        if start == "pissa":
            layer.pissa_init(name, start)
        else:
            layer.olora_init(name)
        weight.data = kept
        for part, dim, sign in (("lora_A", 0, 1), ("lora_B", 1, -1)):
            stored = state[f"{key}.{part}.weight"]
            first = sign * getattr(layer, part)[name].weight.detach().to(stored)
            state[f"{key}.{part}.weight"] = torch.cat((stored, first), dim)
    config = copy.deepcopy(backbone.peft_config[name])
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * a for key, a in config.alpha_pattern.items()}
    return config


def save_adapter(model: nn.Module, folder: str | Path, base: str | None) -> None:
    """Writes the backbone's active adapter in PEFT's format, or removes one written before.

    Args:
        model: a [`CoDDModel`].
        folder: of the adapter.
        base: the path or id of the backbone, for the adapter's configuration.
    """
    name = active_adapter(model)
    if name is not None:
        write_adapter(model.backbone, name, folder, base)
        return
    for file in ADAPTER_FILES:
        Path(folder, file).unlink(missing_ok=True)


def write_adapter(backbone: nn.Module, name: str, folder: str | Path, base: str | None) -> None:
    """Writes an adapter in PEFT's format, with the layers it is on, their ranks and their scales.

    Args:
        backbone: carries it.
        name: the adapter.
        folder: receives the files.
        base: the path or id of the backbone, for the adapter's configuration.
    """
    state = adapter_state_dict(backbone, name)
    config, layers = copy.deepcopy(backbone.peft_config[name]), lora_layers(backbone, name)
    ends = {layer.rpartition(".")[2] for layer in layers}
    alike = {n for n, _ in backbone.named_modules() if n.rpartition(".")[2] in ends}
    config.target_modules = sorted(layers if alike - layers.keys() else ends)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    ranks = {key: layer.r[name] for key, layer in layers.items()}
    alphas = {key: _alpha(layer, name, config.use_rslora) for key, layer in layers.items()}
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: a for key, a in alphas.items() if a != config.lora_alpha}
    config.modules_to_save = sorted(
        key
        for key, layer in adapter_layers(backbone).items()
        if name in getattr(layer, "modules_to_save", ())
    )
    config.modules_to_save = config.modules_to_save or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    weights = {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, Path(folder, ADAPTER_FILES[1]), metadata={"format": "pt"})


def _alpha(layer: nn.Module, name: str, use_rslora: bool) -> float:
    """`lora_alpha` of a layer, as its scale is now."""
    root = math.sqrt(layer.r[name]) if use_rslora else layer.r[name]
    alpha, scale = layer.lora_alpha[name], layer.scaling[name]
    return alpha if alpha / root == scale else scale * root
