"""LoRA on the backbone: put on, switched, saved and loaded, by PEFT's own functions.

The backbone stays the object that it is, and holds the adapters' configurations
(`backbone.peft_config`), also where PEFT wraps the whole model.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import functional
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..checks.errors import reason
from ..hub.repositories import ADAPTER_FILES, Repository, checked_name

TAKEN = {
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
"""Settings with an effect that an adapter may have."""
WITHOUT_EFFECT = {*peft.PeftConfig().to_dict()} - {"peft_type"}
DEFAULTS = peft.LoraConfig().to_dict()
PREFIX = "base_model.model."
"""PEFT puts it before the names of stored weights."""
NAMES = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
A_NAME = re.compile(r"\^?[\w.-]+")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises a ValueError for all but LoRA that can be saved and loaded faithfully and safely."""
    for name, value in settings.items():
        unused = not value or value == DEFAULTS.get(name)
        gaussian = (name, value) == ("init_lora_weights", "gaussian")
        if not (unused or gaussian or name in TAKEN | WITHOUT_EFFECT):
            raise ValueError(
                f"`{name}` of an adapter of a CoDD model cannot be {value!r:.80}: use a "
                "`peft.LoraConfig` on the backbone, without it."
            )


def unwrapped(model: Any) -> Any:
    """The model within PEFT's wrapper, whose adapters must be LoRA; any other model itself."""
    if not hasattr(model, "get_base_model"):
        return model
    for config in model.peft_config.values():
        check_settings(config.to_dict())
    return model.get_base_model()


def add_adapter(
    backbone: PreTrainedModel, config: peft.LoraConfig, name: str, *, empty: bool = False
) -> None:
    """Puts a new adapter on a backbone, if `empty` on the meta device, and makes it active.

    Raises:
        ValueError: the name is taken, the options are not supported, or no layer has their names.
    """
    check_settings(config.to_dict())
    if name in adapter_configs(backbone):
        raise ValueError(f"The backbone has an adapter {name!r} already: choose another name.")
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
    if name not in (there := adapter_configs(backbone)):
        known = ", ".join(map(repr, there)) or "none"
        raise ValueError(f"There is no adapter {name!r}: the backbone's adapters are {known}.")
    switch(backbone, [name])
    functional.set_adapter(backbone, name, inference_mode)


def load_adapter(backbone: PreTrainedModel, adapter: str | Path, name: str, **hub: Any) -> None:
    """Loads a PEFT adapter into a backbone, where it is active and frozen.

    Args:
        backbone: the model that the adapter was trained on.
        adapter: a folder or an id on the Hub, of the adapter or of a head that has one beside it.
        name: the name that it gets.
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
    settings, weights = (folder / file for file in ADAPTER_FILES)
    repository.read(weights)
    state = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(weights).items()}
    if not all(tensor.is_floating_point() for tensor in state.values()):
        raise ValueError(f"`adapter` {source!r} must hold floats alone.")
    used = _stored_settings(repository.read(settings), state)
    before, others = active_state(backbone), [*adapter_configs(backbone)]
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
    functional.cast_adapter_dtype(backbone, name)
    peft.set_peft_model_state_dict(backbone, state, name)  # in float32


def _stored_settings(settings: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The settings of a file; patterns, which can take for ever, give way to the weights' names."""
    check_settings(settings)
    used = {k: value for k, value in settings.items() if k in TAKEN and value is not None}
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
    replaced = adapter_layers(backbone)
    layers = {key: layer for key, layer in replaced.items() if name in getattr(layer, "r", ())}
    config.target_modules = sorted(layers)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    ranks = {key: layer.r[name] for key, layer in layers.items()}
    alphas = {key: layer.lora_alpha[name] for key, layer in layers.items()}
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: a for key, a in alphas.items() if a != config.lora_alpha}
    wholes = {key: getattr(layer, "modules_to_save", ()) for key, layer in replaced.items()}
    config.modules_to_save = sorted(key for key, whole in wholes.items() if name in whole) or None
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    state = peft.get_peft_model_state_dict(
        backbone, backbone.state_dict(), name, save_embedding_layers=False
    )
    weights = {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, Path(folder, ADAPTER_FILES[1]), metadata={"format": "pt"})


def delete_adapter(backbone: PreTrainedModel, name: str) -> None:
    """Removes an adapter; if it was active, the others are off then."""
    if name in active_state(backbone)[0]:  # else PEFT would choose one, and warn
        switch(backbone, [], on=False)
    functional.delete_adapter(backbone, name, "lora_")
    configs = adapter_configs(backbone)
    del configs[name]
    if not configs:
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False


def adapter_configs(backbone: PreTrainedModel) -> dict[str, peft.LoraConfig]:
    """The configurations of a backbone's adapters, by name."""
    return getattr(backbone, "peft_config", {})


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that PEFT has put in the place of a module's own, by name."""
    return {n: m for n, m in module.named_modules() if hasattr(m, "adapter_layer_names")}


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
    _check_adapters(model)
    if any(getattr(layer, "merged", False) for layer in adapter_layers(model).values()):
        raise ValueError(
            "An adapter is merged into the backbone's weights, where it cannot be told from them: "
            "call `unmerge_adapter` or `merge_and_unload` of PEFT's model first."
        )
    names, are_on = active_state(model.backbone)
    names = [name for name in names if are_on and name in adapter_configs(model.backbone)]
    if len(names) > 1:
        raise ValueError(
            f"The backbone has several active adapters ({', '.join(sorted(names))}): only one can "
            "be saved, so activate one or merge them."
        )
    return names[0] if names else None


def _check_adapters(model: Any) -> None:
    for config in adapter_configs(model.backbone).values():
        check_settings(config.to_dict())
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


class AdaptersMixin:
    """The interface of transformers and PEFT to adapters, which are all on the backbone."""

    backbone: PreTrainedModel

    def add_adapter(self, adapter_config: peft.LoraConfig, adapter_name: str = "default") -> None:
        """Adds a new LoRA to the backbone, for training; it is active and all else is frozen."""
        add_adapter(self.backbone, adapter_config, adapter_name)

    def load_adapter(self, adapter: str | Path, adapter_name: str = "default", **hub: Any) -> None:
        """Loads a stored LoRA into the backbone, where it is active and frozen."""
        load_adapter(self.backbone, adapter, adapter_name, **hub)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one and all that is trained."""
        set_adapter(self.backbone, adapter_name)

    def enable_adapters(self) -> None:
        """Switches the active adapter on."""
        switch(self.backbone, active_state(self.backbone)[0])

    def disable_adapters(self) -> None:
        """Switches all adapters off; the backbone then predicts as it does without."""
        switch(self.backbone, active_state(self.backbone)[0], on=False)

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

    @peft_config.deleter
    def peft_config(self) -> None:
        """When PEFT has taken the last adapter off."""
        del self.backbone.peft_config
        self.backbone._hf_peft_config_loaded = False
