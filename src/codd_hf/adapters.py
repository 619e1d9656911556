"""LoRA on the backbone: a model with one is saved as the plain backbone and the adapter apart.

All is done by PEFT's own functions, on a backbone that stays the object that it is.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def _peft():
    # An import statement would make transformers ask for PEFT where this code is loaded as part of
    # a repository (`hub.export`), adapter or not.
    return importlib.import_module("peft")


def add_adapter(backbone: nn.Module, config: Any, name: str) -> None:
    """Puts a new adapter on a backbone and makes it the active one.

    Args:
        backbone: what it is for.
        config: its options, of PEFT's `LoraConfig`.
        name: what it is called.

    Raises:
        ValueError: the name is taken, or the backbone has no layer of the names wanted.
    """
    if name in getattr(backbone, "peft_config", {}):
        raise ValueError(
            f"The backbone has an adapter {name!r} already: choose another name or delete it first."
        )
    try:
        _peft().inject_adapter_in_model(config, backbone, name)
    except ValueError:
        getattr(backbone, "peft_config", {}).pop(name, None)
        raise
    backbone._hf_peft_config_loaded = True  # how transformers knows of it
    set_adapter(backbone, name)


def read_adapter(backbone: nn.Module, folder: str | Path, name: str) -> None:
    """Puts a stored adapter on a backbone, where it is active and frozen.

    Args:
        backbone: what the adapter was trained on.
        folder: holds the files.
        name: what it is called.

    Raises:
        ValueError, RuntimeError, KeyError: the layers, names or shapes are not the backbone's.
    """
    peft = _peft()
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    state = load_file(Path(folder, ADAPTER_FILES[1]))
    own = {id(parameter) for parameter in backbone.parameters()}
    layers = _layers(backbone)
    before = layers[0].active_adapters if layers else []
    enabled = bool(layers) and not layers[0].disable_adapters
    add_adapter(backbone, config, name)
    try:
        added = {key: p for key, p in backbone.named_parameters() if id(p) not in own}
        found = peft.set_peft_model_state_dict(backbone, state, name)
        if wrong := [*found.unexpected_keys, *(set(found.missing_keys) & added.keys())]:
            raise ValueError(f"Weights that are missing, or that no layer has: {wrong[:3]}.")
    except BaseException:
        delete_adapter(backbone, name)
        if before:
            set_adapter(backbone, before[0])
            enable_adapters(backbone, enabled)
        raise
    for parameter in added.values():
        parameter.requires_grad_(False)
    backbone.eval()


def set_adapter(backbone: nn.Module, name: str) -> None:
    """Makes an adapter the active one, alone, and enables it."""
    enable_adapters(backbone)
    importlib.import_module("peft.functional").set_adapter(backbone, name)


def enable_adapters(backbone: nn.Module, enabled: bool = True) -> None:
    """Switches the active adapter on or off."""
    for layer in _layers(backbone):
        layer.enable_adapters(enabled)


def delete_adapter(backbone: nn.Module, name: str) -> None:
    """Removes an adapter; if it was active, all others are switched off.

    Raises:
        KeyError: there is no such adapter.
    """
    prefix = f"{backbone.peft_config.pop(name).peft_type.value.lower()}_"
    if any(name in layer.active_adapters for layer in _layers(backbone)):
        for other in [*backbone.peft_config][:1]:  # else PEFT would choose one, and warn
            set_adapter(backbone, other)
        enable_adapters(backbone, not backbone.peft_config)
    importlib.import_module("peft.functional").delete_adapter(backbone, name, prefix)
    if not backbone.peft_config:
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False


def adapter_of(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the PEFT configuration of a model's backbone, and the active adapter.

    That is the backbone, if the adapter was loaded for it, or the model, if PEFT wrapped it all.
    None if the backbone has no adapter, or it is switched off.
    """
    for owner in (model.backbone, model):
        if getattr(owner, "peft_config", None):
            active = {name for layer in _layers(model.backbone) for name in layer.active_adapters}
            if not active or any(layer.disable_adapters for layer in _layers(model.backbone)):
                return None
            if len(active) > 1:
                raise ValueError(
                    f"The backbone has several active adapters ({', '.join(sorted(active))}): only "
                    "one can be saved, so activate one or merge them."
                )
            return owner, active.pop()
    return None


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put an adapter on."""
    return [m for m in module.modules() if hasattr(m, "adapter_layer_names")]


@contextmanager
def adapter_in_use(backbone: nn.Module, name: str | None) -> Iterator[None]:
    """Runs a backbone with one of its adapters (None: with none), and leaves all as it was.

    PEFT's own switches would also change which parameters are trained.
    """
    layers = _layers(backbone)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], name is None
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = state


def without_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model as if no adapter had been added to its backbone."""
    renamed, dropped = {}, []
    for name, layer in model.named_modules():
        if not hasattr(layer, "adapter_layer_names"):
            continue
        if name == "coupling_head":  # what PEFT trains in full is the head itself
            renamed[f"{name}.modules_to_save.{layer.active_adapters[0]}."] = f"{name}."
            dropped.append(f"{name}.original_module.")
            continue
        inner = "base_layer" if hasattr(layer, "base_layer") else "original_module"
        renamed[f"{name}.{inner}."] = f"{name}."
        dropped += [f"{name}.{part}." for part in layer.adapter_layer_names]
    state = {}
    for key, tensor in model.state_dict().items():
        if key.startswith(tuple(dropped)):
            continue
        for prefix, plain in renamed.items():
            if key.startswith(prefix):
                key = plain + key.removeprefix(prefix)
        state[key] = tensor
    return state


def save_adapter(model: nn.Module, folder: str | Path, base: str | None) -> None:
    """Writes the backbone's active adapter in PEFT's format, or removes one written before.

    Args:
        model: a [`CoDDModel`].
        folder: of the adapter.
        base: the path or id of the backbone, for the adapter's configuration.
    """
    folder, found = Path(folder), adapter_of(model)
    if found is None:
        for file in ADAPTER_FILES:
            (folder / file).unlink(missing_ok=True)
        return
    owner, name = found
    write_adapter(owner, name, folder, base, prefix="backbone." if owner is model else "")


def write_adapter(
    owner: nn.Module, name: str, folder: str | Path, base: str | None, prefix: str = ""
) -> None:
    """Writes an adapter in PEFT's format.

    Args:
        owner: the module that holds its PEFT configuration.
        name: the adapter.
        folder: receives the files.
        base: the path or id of the backbone, for the adapter's configuration.
        prefix: of the names of the backbone's modules in the owner.
    """
    state = _peft().get_peft_model_state_dict(owner, adapter_name=name)
    state = {
        f"base_model.model.{key.removeprefix(prefix)}": tensor.contiguous()
        for key, tensor in state.items()
        if key.startswith(prefix)
    }
    config = copy.deepcopy(owner.peft_config[name])
    config.modules_to_save = [
        m for m in config.modules_to_save or [] if m != "coupling_head"
    ] or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(state, Path(folder, ADAPTER_FILES[1]), metadata={"format": "pt"})
