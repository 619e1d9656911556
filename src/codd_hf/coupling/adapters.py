"""LoRA on the backbone: how it is put on, switched and taken off.

All is done by PEFT's own functions, on a backbone that stays the object that it is. The backbone
holds the adapters' configurations (`backbone.peft_config`), also where PEFT wraps the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import functional
from torch import nn

from .adapter_settings import CHANGING_STARTS, PLAIN_STARTS, check_adapter_settings


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within PEFT's wrapper, whose adapters must be LoRA; any other model itself."""
    if not hasattr(model, "get_base_model"):
        return model
    for config in model.peft_config.values():
        check_adapter_settings(config.to_dict())
    return model.get_base_model()


def add_adapter(backbone: nn.Module, config: peft.LoraConfig, name: str) -> None:
    """Puts a new adapter on a backbone and makes it the active one.

    Raises:
        ValueError: the name is taken, the options are not supported, or the backbone has no layer
            of the names in `config`.
    """
    check_adapter_settings(config.to_dict())
    there = adapter_configs(backbone)
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"The name of an adapter must be a text without dots, got {name!r}.")
    if name in there:
        raise ValueError(
            f"The backbone has an adapter {name!r} already: choose another name or delete it first."
        )
    refuse_changes([*starts_of(backbone), config.init_lora_weights] if there else [])
    training = backbone.training
    names = {key: getattr(config, key) for key in ("target_modules", "modules_to_save")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            peft.inject_adapter_in_model(config, backbone, name)
        _check_all_found(backbone, names)
        if any(p.is_meta for n, p in backbone.named_parameters() if f".{name}." in f".{n}."):
            raise ValueError("they are offloaded, by `device_map`")
    except Exception as error:  # whatever it is, PEFT leaves what it has done so far
        _take_off(backbone, backbone, name)
        told = " and ".join(f"`{key}` {value!r:.80}" for key, value in names.items() if value)
        raise ValueError(
            f"{told} of an adapter must name layers of the backbone that PEFT can adapt "
            f"({str(error).partition(chr(10))[0][:120]})."
        ) from error
    functional.cast_adapter_dtype(backbone, name)
    backbone._hf_peft_config_loaded = True  # how transformers knows of it
    backbone.train(training)
    set_adapter(backbone, name)


def _check_all_found(backbone: nn.Module, names: dict[str, Any]) -> None:
    """Raises for names of layers that PEFT has passed over."""
    found = [f".{key}" for key in adapter_layers(backbone)]
    for value in names.values():
        wanted = set(() if value is None or isinstance(value, str) else value) - {"coupling_head"}
        if missed := {n for n in wanted if not any(key.endswith(f".{n}") for key in found)}:
            raise ValueError(f"There are no modules {sorted(missed)}.")


def refuse_changes(starts: Iterable[Any]) -> None:
    """Raises a ValueError for a start (`init_lora_weights`) that changes the backbone's weights."""
    for start in starts:
        if start in CHANGING_STARTS:
            raise ValueError(
                f"`init_lora_weights` {start!r} changes the backbone's weights: an adapter with it "
                "must be the only one, for the only head."
            )


def starts_of(backbone: nn.Module) -> list[Any]:
    """`init_lora_weights` of a backbone's adapters."""
    configs = adapter_configs(backbone).values()
    return [getattr(config, "init_lora_weights", True) for config in configs]


def set_adapter(backbone: nn.Module, name: str, *, train: bool = True) -> None:
    """Makes an adapter the active one and, with `train`, all that is trained."""
    trained = {} if train else {p: p.requires_grad for p in backbone.parameters()}
    enable_adapters(backbone)
    functional.set_adapter(backbone, name)
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)


def enable_adapters(backbone: nn.Module, enabled: bool = True) -> None:
    """Switches the active adapter on or off."""
    for layer in adapter_layers(backbone).values():
        layer.enable_adapters(enabled)


@contextmanager
def adapter_in_use(backbone: nn.Module, name: str | None) -> Iterator[None]:
    """Runs a backbone with one of its adapters (None: with none), and leaves all as it was.

    PEFT's own switches would also change which parameters are trained.
    """
    layers = [*adapter_layers(backbone).values()]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], name is None
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = state


def delete_adapter(backbone: nn.Module, name: str) -> None:
    """Removes an adapter that has not changed the backbone's weights; others are switched off."""
    config = adapter_configs(backbone, name)[name]
    _check_not_merged(backbone)
    if config.init_lora_weights in CHANGING_STARTS:
        raise ValueError(
            f"The adapter {name!r} (`init_lora_weights={config.init_lora_weights!r}`) cannot be "
            "deleted: it has changed the backbone's weights, so load the model again instead."
        )
    del backbone.peft_config[name]
    if name in active_state(backbone)[0]:
        for other in [*backbone.peft_config][:1]:  # else PEFT would choose one, and warn
            set_adapter(backbone, other, train=False)
        enable_adapters(backbone, not backbone.peft_config)
    functional.delete_adapter(backbone, name, "lora_")
    if not backbone.peft_config:
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False


def adapter_configs(backbone: nn.Module, name: str | None = None) -> dict[str, peft.LoraConfig]:
    """The configurations of a backbone's adapters; with a `name`, that one must be among them."""
    there = getattr(backbone, "peft_config", {})
    if name is not None and name not in there:
        known = ", ".join(map(repr, there)) or "none"
        raise ValueError(f"There is no adapter {name!r}: the backbone's adapters are {known}.")
    return there


def adapter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT has put in the place of a module's own, by name."""
    return {n: m for n, m in module.named_modules() if hasattr(m, "adapter_layer_names")}


def lora_layers(backbone: nn.Module, name: str) -> dict[str, nn.Module]:
    """The layers that carry an adapter."""
    return {n: m for n, m in adapter_layers(backbone).items() if name in getattr(m, "r", ())}


def active_state(backbone: nn.Module) -> tuple[list[str], bool]:
    """The active adapters, and whether they are on."""
    layers = adapter_layers(backbone).values()
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return [*names], bool(names) and not any(layer.disable_adapters for layer in layers)


def restore(backbone: nn.Module, state: tuple[list[str], bool]) -> None:
    """Puts back what `active_state` gave."""
    for name in state[0][:1]:
        set_adapter(backbone, name, train=False)
    if not state[1]:
        enable_adapters(backbone, False)


def _check_not_merged(backbone: nn.Module) -> None:
    if any(getattr(layer, "merged", False) for layer in adapter_layers(backbone).values()):
        raise ValueError(
            "An adapter is merged into the backbone's weights, where it cannot be told from them: "
            "call `unmerge_adapter` or `merge_and_unload` of PEFT's model first."
        )


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that a [`CoDDModel`]'s backbone runs with; None if it has none, or it is off.

    Raises:
        ValueError: there are several, or one that could not be saved.
    """
    _check_not_merged(model.backbone)
    names, are_on = active_state(model.backbone)
    names = [name for name in names if name in adapter_configs(model.backbone)]
    if not names or not are_on:
        return None
    if len(names) > 1:
        raise ValueError(
            f"The backbone has several active adapters ({', '.join(sorted(names))}): only one can "
            "be saved, so activate one or merge them."
        )
    check_adapters(model)
    return names[0]


def check_adapters(model: nn.Module) -> None:
    """Raises a ValueError for adapters of a [`CoDDModel`] that could not be saved."""
    for config in adapter_configs(model.backbone).values():
        check_adapter_settings(config.to_dict())
    for name in adapter_layers(model):
        if not name.startswith("backbone.") and name != "coupling_head":
            raise ValueError(
                f"The module {name!r} of a CoDD model cannot get an adapter: name layers of the "
                "backbone as `target_modules`, and train the head in full with "
                "`modules_to_save=['coupling_head']`."
            )


def without_adapters(
    model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The state dict of a [`CoDDModel`] as if no adapter had been added to its backbone."""
    renamed: dict[str, str | None] = {}
    for name, layer in adapter_layers(model).items():
        children = dict(layer.named_children())
        kept = "base_layer" if "base_layer" in children else "original_module"
        if name == "coupling_head" and layer.active_adapters and not layer.disable_adapters:
            kept = f"modules_to_save.{layer.active_adapters[0]}"  # what PEFT trains is the head
        renamed[f"{name}.{kept}."] = f"{name}."
        renamed |= {f"{name}.{child}.": None for child in children if child != kept}
    state = {}
    for key, tensor in (model.state_dict() if state_dict is None else state_dict).items():
        prefix = next((prefix for prefix in renamed if key.startswith(prefix)), None)
        if prefix is None:
            state[key] = tensor
        elif renamed[prefix] is not None:
            state[renamed[prefix] + key.removeprefix(prefix)] = tensor
    return state


def adapter_state_dict(backbone: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights, without its name. Embeddings are the backbone's and not among them."""
    return peft.get_peft_model_state_dict(
        backbone, backbone.state_dict(), adapter_name=name, save_embedding_layers=False
    )


def _take_off(module: nn.Module, backbone: nn.Module, adapter: str) -> None:
    """Takes an adapter off that was refused; without another one, a module is as it was before."""
    configs, layers = adapter_configs(backbone), adapter_layers(module)
    start = getattr(configs.pop(adapter, None), "init_lora_weights", True)
    if start not in PLAIN_STARTS:
        for layer in lora_layers(module, adapter).values():
            layer.get_base_layer().weight.data += layer.get_delta_weight(adapter)
    if configs:
        for layer in layers.values():
            layer.delete_adapter(adapter)
        return
    backbone.__dict__.pop("peft_config", None)
    for name in layers:
        parent, _, child = name.rpartition(".")
        try:
            layer = module.get_submodule(name)
        except AttributeError:  # a part of one that is gone
            continue
        while hasattr(layer, "adapter_layer_names"):
            inner = layer._modules.get("base_layer")
            layer = layer.original_module if inner is None else inner
        setattr(module.get_submodule(parent), child, layer)


class AdaptersMixin:
    """The interface of transformers and PEFT to adapters, which are all on the backbone."""

    @property
    def peft_config(self) -> dict[str, peft.LoraConfig]:
        """PEFT's configurations of the backbone's adapters, by name."""
        return self.backbone.peft_config

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        """PEFT's last act in wrapping a model: an adapter that could not be saved is taken off."""
        self.backbone.peft_config = configs
        try:
            check_adapters(self)
            if len(self.heads) > 1:
                refuse_changes(starts_of(self.backbone))
        except ValueError:
            _take_off(self, self.backbone, next(reversed(configs)))
            raise

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.backbone.peft_config

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As in torch; a model with adapters refuses a state dict without them."""
        has_adapters = adapter_layers(self) and adapter_configs(self.backbone)
        if has_adapters and not any(".lora_" in key for key in state_dict):
            raise ValueError(
                "`state_dict` must hold the adapters that the model has, got none of their "
                "weights: load what `save_pretrained` wrote, or train with transformers' Trainer "
                "what `peft.get_peft_model` returns, whose checkpoints hold them."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def add_adapter(self, adapter_config: peft.LoraConfig, adapter_name: str | None = None) -> None:
        """Adds a new LoRA to the backbone, for training; it is active and all else is frozen."""
        if not hasattr(adapter_config, "peft_type"):
            raise TypeError(
                "`adapter_config` must be a `peft.LoraConfig`, got "
                f"{type(adapter_config).__name__}."
            )
        add_adapter(self.backbone, adapter_config, adapter_name or "default")
        self.peft_config = self.backbone.peft_config  # which checks it beside the heads

    def load_adapter(
        self, adapter: str | Path, adapter_name: str | None = None, **hub: Any
    ) -> None:
        """Loads a stored LoRA into the backbone, where it is active and frozen.

        The arguments are those of [`~codd_hf.coupling.adapter_files.load_adapter`].
        """
        from .adapter_files import load_adapter

        load_adapter(self.backbone, adapter, adapter_name or "default", **hub)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one."""
        adapter_configs(self.backbone, adapter_name)
        set_adapter(self.backbone, adapter_name)

    def enable_adapters(self) -> None:
        """Switches the active adapter on."""
        enable_adapters(self.backbone)

    def disable_adapters(self) -> None:
        """Switches all adapters off; the backbone then predicts as it does without."""
        enable_adapters(self.backbone, False)

    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return active_state(self.backbone)[0]

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Removes adapters of these names."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            adapter_configs(self.backbone, name)
        for name in names:
            delete_adapter(self.backbone, name)

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """An adapter's weights, by default the active one's, as PEFT stores them."""
        name = (self.active_adapters() or [None])[0] if adapter_name is None else adapter_name
        adapter_configs(self.backbone, name or "")
        return adapter_state_dict(self.backbone, name)
