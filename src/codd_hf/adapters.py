"""LoRA on the backbone: a model with one is saved as the plain backbone and the adapter apart."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .loading import ADAPTER_FILES


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
    # An import statement would make transformers ask for PEFT where this code is loaded as part of
    # a repository (`hub.export`), adapter or not.
    peft = importlib.import_module("peft")
    owner, name = found
    state = peft.get_peft_model_state_dict(owner, adapter_name=name)
    if owner is model:
        state = {
            key.removeprefix("backbone."): tensor
            for key, tensor in state.items()
            if key.startswith("backbone.")
        }
    config = copy.deepcopy(owner.peft_config[name])
    config.modules_to_save = [
        m for m in config.modules_to_save or [] if m != "coupling_head"
    ] or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    weights = {f"base_model.model.{key}": t.contiguous() for key, t in state.items()}
    save_file(weights, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
