"""LoRA on the backbone: how it is put on, switched and taken off.

All is done by PEFT's own functions, on a backbone that stays the object that it is. The backbone
holds the adapters' configurations (`backbone.peft_config`), also where PEFT wraps the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import functional
from torch import nn
from transformers import PreTrainedModel

PISSA = "pissa"
"""The start (`init_lora_weights`) that takes the adapter's first value off the weights."""
ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", PISSA),
}
TAKEN = {
    *ONLY,
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
}
WITHOUT_EFFECT = {*peft.PeftConfig().to_dict(), "eva_config"}
DEFAULTS = peft.LoraConfig().to_dict()


def taken_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter that have an effect.

    Raises:
        ValueError: it is no LoRA, or one that could not be saved and loaded faithfully and safely.
    """
    kind = settings.get("peft_type")
    if (kind := getattr(kind, "value", kind)) != "LORA":
        raise ValueError(
            f"`peft_type` must be 'LORA' for the adapter of a CoDD model, got {kind!r:.80}: use a "
            "`peft.LoraConfig` on the backbone."
        )
    for name, value in settings.items():
        unused = value in (None, False, [], {}, DEFAULTS.get(name))
        known = value in ONLY[name] if name in ONLY else name in TAKEN | WITHOUT_EFFECT
        if not (known or unused):
            remedy = f"give one of {ONLY[name]}" if name in ONLY else "leave it out"
            raise ValueError(
                f"`{name}` of an adapter of a CoDD model cannot be {value!r:.80}: {remedy}."
            )
    return {name: value for name, value in settings.items() if name in TAKEN}


def unwrapped(model: Any) -> Any:
    """The model within PEFT's wrapper, whose adapters must be LoRA; any other model itself."""
    if not hasattr(model, "get_base_model"):
        return model
    for config in model.peft_config.values():
        taken_settings(config.to_dict())
    return model.get_base_model()


def add_adapter(
    backbone: PreTrainedModel, config: peft.LoraConfig, name: str, *, empty: bool = False
) -> None:
    """Puts a new adapter on a backbone, if `empty` on the meta device, and makes it active.

    Raises:
        ValueError: the name is taken, the options are not supported, or no layer has their names.
    """
    taken_settings(config.to_dict())
    there = adapter_configs(backbone)
    if name in there:
        raise ValueError(f"The backbone has an adapter {name!r} already: choose another name.")
    if there:
        refuse_pissa(config, *there.values())
    if any(parameter.is_meta for parameter in backbone.parameters()):
        raise ValueError("A backbone whose layers are offloaded (`device_map`) gets no adapter.")
    training = backbone.training
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        peft.inject_adapter_in_model(config, backbone, name, low_cpu_mem_usage=empty)
    functional.cast_adapter_dtype(backbone, name)
    backbone._hf_peft_config_loaded = True  # how transformers knows of it
    backbone.train(training)
    set_adapter(backbone, name, config.inference_mode)


def set_adapter(backbone: PreTrainedModel, name: str, inference_mode: bool = False) -> None:
    """Makes an adapter the active one and, but in inference, all that is trained."""
    switch(backbone, [name])
    functional.set_adapter(backbone, name, inference_mode)


def delete_adapter(backbone: PreTrainedModel, name: str) -> None:
    """Removes an adapter that has not changed the backbone's weights; the others are off then."""
    _check_not_merged(backbone)
    configs = adapter_configs(backbone, name)
    refuse_pissa(configs[name])
    del configs[name]
    if configs and name in active_state(backbone)[0]:  # else PEFT would choose one, and warn
        switch(backbone, [next(iter(configs))], on=False)
    functional.delete_adapter(backbone, name, "lora_")
    if not configs:
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False


def refuse_pissa(*configs: peft.LoraConfig) -> None:
    """Raises a ValueError for an adapter whose start has changed the backbone's weights."""
    if any(config.init_lora_weights == PISSA for config in configs):
        raise ValueError(
            f"An adapter with `init_lora_weights={PISSA!r}` changes the backbone's weights: it is "
            "the only one, for the only head, and is not deleted. Load the model again instead."
        )


def adapter_configs(
    backbone: PreTrainedModel, name: str | None = None
) -> dict[str, peft.LoraConfig]:
    """The configurations of a backbone's adapters; with a `name`, that one must be among them."""
    there = getattr(backbone, "peft_config", {})
    if name is not None and name not in there:
        known = ", ".join(map(repr, there)) or "none"
        raise ValueError(f"There is no adapter {name!r}: the backbone's adapters are {known}.")
    return there


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that PEFT has put in the place of a module's own, by name."""
    return {n: m for n, m in module.named_modules() if hasattr(m, "adapter_layer_names")}


def lora_layers(backbone: nn.Module, name: str) -> dict[str, Any]:
    """The layers that carry an adapter."""
    return {n: m for n, m in adapter_layers(backbone).items() if name in getattr(m, "r", ())}


def active_state(backbone: nn.Module) -> tuple[list[str], bool]:
    """The active adapters, and whether they are on."""
    layers = adapter_layers(backbone).values()
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return [*names], bool(names) and not any(layer.disable_adapters for layer in layers)


def switch(backbone: nn.Module, names: list[str], on: bool = True) -> None:
    """Says which adapters are active; PEFT's own switches also say which are trained."""
    for layer in adapter_layers(backbone).values():
        layer._active_adapter, layer._disable_adapters = names, not on


def active_adapter(model: Any) -> str | None:
    """The adapter that a [`CoDDModel`]'s backbone runs with; None if it has none, or it is off.

    Raises:
        ValueError: there are several, or one that could not be saved.
    """
    _check_not_merged(model.backbone)
    _check_adapters(model)
    names, are_on = active_state(model.backbone)
    names = [name for name in names if are_on and name in adapter_configs(model.backbone)]
    if len(names) > 1:
        raise ValueError(
            f"The backbone has several active adapters ({', '.join(sorted(names))}): only one can "
            "be saved, so activate one or merge them."
        )
    return names[0] if names else None


def _check_not_merged(backbone: nn.Module) -> None:
    if any(getattr(layer, "merged", False) for layer in adapter_layers(backbone).values()):
        raise ValueError(
            "An adapter is merged into the backbone's weights, where it cannot be told from them: "
            "call `unmerge_adapter` or `merge_and_unload` of PEFT's model first."
        )


def _check_adapters(model: Any) -> None:
    for config in adapter_configs(model.backbone).values():
        taken_settings(config.to_dict())
    for name in adapter_layers(model):
        if not name.startswith("backbone.") and name != "coupling_head":
            raise ValueError(
                f"The module {name!r} of a CoDD model cannot get an adapter: load the model again, "
                "name layers of the backbone as `target_modules`, and train the head in full with "
                "`modules_to_save=['coupling_head']`."
            )


def without_adapters(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The state dict of a [`CoDDModel`] as if no adapter had been added to its backbone."""
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name, layer in adapter_layers(model).items():
        kept = "base_layer" if "base_layer" in layer._modules else "original_module"
        if name == "coupling_head" and layer.active_adapters and not layer.disable_adapters:
            kept = f"modules_to_save.{layer.active_adapters[0]}"  # what PEFT trains is the head
        for key in [key for key in state if key.startswith(f"{name}.")]:
            tensor = state.pop(key)
            if key.startswith(f"{name}.{kept}."):
                state[f"{name}.{key.removeprefix(f'{name}.{kept}.')}"] = tensor
    return state


def adapter_state_dict(backbone: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights, without its name. Embeddings are the backbone's and not among them."""
    adapter_configs(backbone, name)
    return peft.get_peft_model_state_dict(
        backbone, backbone.state_dict(), adapter_name=name, save_embedding_layers=False
    )


class AdaptersMixin:
    """The interface of transformers and PEFT to adapters, which are all on the backbone."""

    backbone: PreTrainedModel
    heads: Any

    @property
    def peft_config(self) -> dict[str, peft.LoraConfig]:
        """PEFT's configurations of the backbone's adapters, by name."""
        return self.backbone.peft_config  # type: ignore[return-value]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        """PEFT's last act in wrapping a model: an adapter that could not be saved is refused."""
        self.backbone.peft_config = configs
        self.backbone._hf_peft_config_loaded = True
        _check_adapters(self)
        if len(self.heads) > 1:
            refuse_pissa(*configs.values())

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.backbone.peft_config
        self.backbone._hf_peft_config_loaded = False

    def add_adapter(self, adapter_config: peft.LoraConfig, adapter_name: str | None = None) -> None:
        """Adds a new LoRA to the backbone, for training; it is active and all else is frozen."""
        if len(self.heads) > 1:
            refuse_pissa(adapter_config)
        add_adapter(self.backbone, adapter_config, adapter_name or "default")

    def load_adapter(self, adapter: Any, adapter_name: str | None = None, **hub: Any) -> None:
        """Loads a stored LoRA into the backbone, where it is active and frozen."""
        from .adapter_files import load_adapter

        load_adapter(self.backbone, adapter, adapter_name or "default", **hub)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one and all that is trained."""
        adapter_configs(self.backbone, adapter_name)
        set_adapter(self.backbone, adapter_name)

    def enable_adapters(self) -> None:
        """Switches the active adapter on."""
        switch(self.backbone, self.active_adapters())

    def disable_adapters(self) -> None:
        """Switches all adapters off; the backbone then predicts as it does without."""
        switch(self.backbone, self.active_adapters(), on=False)

    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return active_state(self.backbone)[0]

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Removes adapters of these names."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            delete_adapter(self.backbone, name)

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """An adapter's weights, by default the active one's, as PEFT stores them."""
        name = next(iter(self.active_adapters()), "") if adapter_name is None else adapter_name
        return adapter_state_dict(self.backbone, name)
