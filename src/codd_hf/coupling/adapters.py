"""LoRA on the backbone: a model with one is saved as the plain backbone and the adapter apart.

All is done by PEFT's own functions, on a backbone that stays the object that it is. The backbone
holds the adapters' configurations (`backbone.peft_config`), also where PEFT wraps the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import functional
from torch import nn

from .adapter_settings import CHANGING_STARTS, PLAIN_STARTS, check_adapter_settings


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within PEFT's wrapper, whose adapters are on its layers; any other model itself.

    Raises:
        ValueError: the wrapper holds what would be lost (virtual tokens), or an adapter of a kind
            that cannot be saved.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for config in model.peft_config.values():
        check_adapter_settings(config.to_dict())
    return model.get_base_model()


def add_adapter(backbone: nn.Module, config: Any, name: str, *, to_be_filled: bool = False) -> None:
    """Puts a new adapter on a backbone and makes it the active one.

    Args:
        backbone: what it is for.
        config: its options, of PEFT's `LoraConfig`.
        name: what it is called.
        to_be_filled: whether the caller will set all its weights, which may be on layers that are
            offloaded.

    Raises:
        ValueError: the name is taken, the options are not supported, or the backbone has no layer
            of the names wanted.
    """
    check_adapter_settings(config.to_dict())
    check_room_for(backbone, name)
    there = getattr(backbone, "peft_config", {})
    if there and config.init_lora_weights in CHANGING_STARTS:
        raise ValueError(
            f"`init_lora_weights` {config.init_lora_weights!r} changes the backbone's weights, "
            f"which the adapter {next(iter(there))!r} needs as they are: use True."
        )
    training = backbone.training
    try:
        with warnings.catch_warnings():  # of several adapters, which is what is wanted
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            peft.inject_adapter_in_model(config, backbone, name)
        missed = set(config.modules_to_save or ()) - {"coupling_head"}
        for key, layer in adapter_layers(backbone).items():
            if name in getattr(layer, "modules_to_save", ()):
                missed -= {wanted for wanted in missed if key.endswith(wanted)}
        if missed:
            raise ValueError(f"There are no modules {sorted(missed)}.")
        _put_on_devices(backbone, config, name, to_be_filled)
    except Exception as error:  # whatever it is, PEFT leaves what it has done so far
        wanted = {key: getattr(config, key) for key in ("target_modules", "modules_to_save")}
        _remove_layers(backbone, name)
        if not there:
            backbone.__dict__.pop("peft_config", None)
        there.pop(name, None)
        told = " and ".join(f"`{key}` {value!r:.80}" for key, value in wanted.items() if value)
        raise ValueError(
            f"{told} of an adapter must name layers of the backbone that PEFT can adapt "
            f"({str(error).partition(chr(10))[0][:120]})."
        ) from error
    functional.cast_adapter_dtype(backbone, name)
    backbone._hf_peft_config_loaded = True  # how transformers knows of it
    backbone.train(training)
    set_adapter(backbone, name)


def _put_on_devices(backbone: nn.Module, config: Any, name: str, to_be_filled: bool) -> None:
    """Gives weights that PEFT made beside offloaded ones, on no device, a place to be loaded to.

    Raises:
        ValueError: the adapter is computed from weights that are not there now.
    """
    layers = adapter_layers(backbone).values()
    absent = [layer for layer in layers if _is_on_no_device(layer, name)]
    plain = not config.use_dora and not config.modules_to_save and to_be_filled
    for layer in absent:
        hook = getattr(layer.get_base_layer(), "_hf_hook", None) if plain else None
        if hook is None or layer.lora_embedding_A:
            raise ValueError("they are offloaded (`device_map`), where a stored LoRA alone can go")
        for part in (layer.lora_A, layer.lora_B):
            part[name].to_empty(device=torch.device(hook.execution_device))


def _is_on_no_device(layer: nn.Module, name: str) -> bool:
    own = (p for n, p in layer.named_parameters() if f".{name}." in f".{n}.")
    return any(parameter.is_meta for parameter in own)


def check_room_for(backbone: nn.Module, name: str) -> None:
    """Refuses a new adapter whose name is taken, or beside one that changed the backbone.

    Raises:
        ValueError: it is so.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"The name of an adapter must be a text without dots, got {name!r}.")
    if name in getattr(backbone, "peft_config", {}):
        raise ValueError(
            f"The backbone has an adapter {name!r} already: choose another name or delete it first."
        )
    check_backbone_is_whole(backbone, f"the adapter {name!r}")


def check_backbone_is_whole(backbone: nn.Module, user: str) -> None:
    """Refuses a second use of a backbone whose weights an adapter has changed.

    Raises:
        ValueError: there is such an adapter; the message names it and the `user`.
    """
    for name, config in getattr(backbone, "peft_config", {}).items():
        if (start := getattr(config, "init_lora_weights", None)) in CHANGING_STARTS:
            raise ValueError(
                f"The adapter {name!r} (`init_lora_weights={start!r}`) has changed the backbone's "
                f"weights, which {user} needs as they were: `save_head`, and load what it writes "
                "into a model with the weights as they were."
            )


def set_adapter(backbone: nn.Module, name: str, *, train: bool = True) -> None:
    """Makes an adapter the active one, alone, and enables it.

    Args:
        backbone: carries it.
        name: the adapter.
        train: whether it is trained from now on, alone, as PEFT has it; else nothing of that is
            changed.
    """
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
    """Removes an adapter; if it was active, all others are switched off.

    Raises:
        ValueError: it is merged into the backbone's weights, or has changed them by its start.
        KeyError: there is no such adapter.
    """
    config = backbone.peft_config[name]
    _check_not_merged(backbone)
    if (start := getattr(config, "init_lora_weights", None)) in CHANGING_STARTS:
        raise ValueError(
            f"The adapter {name!r} (`init_lora_weights={start!r}`) cannot be deleted: it has "
            "changed the backbone's weights, so load the model again instead."
        )
    del backbone.peft_config[name]
    if name in active_state(backbone)[0]:
        for other in [*backbone.peft_config][:1]:  # else PEFT would choose one, and warn
            set_adapter(backbone, other, train=False)
        enable_adapters(backbone, not backbone.peft_config)
    prefix = f"{config.peft_type.value.lower()}_"
    functional.delete_adapter(backbone, name, prefix)
    if not backbone.peft_config:
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False


def adapter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT has put in the place of a module's own, by name."""
    return {n: m for n, m in module.named_modules() if hasattr(m, "adapter_layer_names")}


def lora_layers(backbone: nn.Module, name: str) -> dict[str, nn.Module]:
    return {n: m for n, m in adapter_layers(backbone).items() if name in getattr(m, "r", ())}


def active_state(backbone: nn.Module) -> tuple[list[str], bool]:
    """The active adapters, and whether they are on."""
    layers = adapter_layers(backbone).values()
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return [*names], not any(layer.disable_adapters for layer in layers)


def restore(backbone: nn.Module, state: tuple[list[str], bool]) -> None:
    for name in state[0][:1]:
        set_adapter(backbone, name, train=False)
        enable_adapters(backbone, state[1])


def _check_not_merged(backbone: nn.Module) -> None:
    layers = adapter_layers(backbone).values()
    if any(getattr(layer, "merged", False) for layer in layers):
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
    known = getattr(model.backbone, "peft_config", {})
    for name in (name for name in names if name not in known):
        if any(
            layer.get_delta_weight(name).any()
            for layer in lora_layers(model.backbone, name).values()
        ):
            raise ValueError(
                f"The adapter {name!r} is on a part of the backbone only, since PEFT refused to "
                "make it: load the model again."
            )
    names = [name for name in names if name in known]
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
    """Refuses adapters of a [`CoDDModel`] that could not be saved.

    Raises:
        ValueError: one is of a kind that is not supported, or on another part than the backbone.
    """
    for config in getattr(model.backbone, "peft_config", {}).values():
        check_adapter_settings(config.to_dict())
    for name in adapter_layers(model):
        if not name.startswith("backbone.") and name != "coupling_head":
            raise _not_on(name)


def _not_on(module: str) -> ValueError:
    return ValueError(
        f"The module {module!r} of a CoDD model cannot get an adapter: name layers of the backbone "
        "as `target_modules`, and train the head in full with `modules_to_save=['coupling_head']`."
    )


def without_adapters(
    model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The state dict of a model as if no adapter had been added to its backbone.

    Args:
        model: a [`CoDDModel`].
        state_dict: its own, where the caller has it already.

    Raises:
        ValueError: a weight under an adapter is offloaded.
    """
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
        for prefix, plain in renamed.items():
            if key.startswith(prefix):
                key = None if plain is None else plain + key.removeprefix(prefix)
                if key is not None and tensor.is_meta:
                    raise ValueError(
                        f"{key!r} is offloaded and has an adapter: load the model without "
                        "`device_map` to save it (`save_head` saves head and adapter)."
                    )
                break
        if key is not None:
            state[key] = tensor
    return state


def adapter_state_dict(backbone: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights, without its name. Embeddings are the backbone's and not among them."""
    return peft.get_peft_model_state_dict(
        backbone, backbone.state_dict(), adapter_name=name, save_embedding_layers=False
    )


def _remove_layers(module: nn.Module, adapter: str) -> None:
    """Takes an adapter off that was refused; without another one, a module is as it was before."""
    configs, layers = getattr(module, "peft_config", {}), adapter_layers(module)
    start = getattr(configs.get(adapter), "init_lora_weights", True)
    for layer in lora_layers(module, adapter).values() if start not in PLAIN_STARTS else ():
        layer.get_base_layer().weight.data += layer.get_delta_weight(adapter)
    if configs.keys() - {adapter}:
        for layer in layers.values():
            layer.delete_adapter(adapter)
        return
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
    """Adapters of a [`CoDDModel`]: all of them are on its backbone, however they are made."""

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's configurations of the backbone's adapters, by name."""
        return self.backbone.peft_config

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        """What `peft.get_peft_model` does last: an adapter that could not be saved is taken off."""
        self.backbone.peft_config = configs
        try:
            check_adapters(self)
            for head in self.heads[1:]:
                check_backbone_is_whole(self.backbone, f"the head {head!r}")
        except ValueError:
            newest = next(reversed(configs))
            _remove_layers(self, newest)
            del configs[newest]
            if not configs:
                del self.backbone.peft_config
            raise

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.backbone.peft_config

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As in torch.

        Raises:
            ValueError: the model has adapters, of which there is nothing: it would go on with those
                that it has.
        """
        absent = adapter_layers(self) and not any(".lora_" in key for key in state_dict)
        if absent and getattr(self.backbone, "peft_config", None):
            raise ValueError(
                "`state_dict` must hold the adapters that the model has, got none of their "
                "weights: load what `save_pretrained` wrote, or train with transformers' Trainer "
                "what `peft.get_peft_model` returns, whose checkpoints hold them."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Adds a new LoRA to the backbone, for training; it is active and all else is frozen.

        Args:
            adapter_config: a `peft.LoraConfig`.
            adapter_name: what to call it.

        Raises:
            TypeError: it is none.
            ValueError: the name is taken, the options are not supported, or the backbone has no
                layer of the names wanted.
        """
        if not hasattr(adapter_config, "peft_type"):
            raise TypeError(
                "`adapter_config` must be a `peft.LoraConfig`, got "
                f"{type(adapter_config).__name__}."
            )
        targets = getattr(adapter_config, "target_modules", None) or ()
        ends = () if isinstance(targets, str) else tuple(f".{target}" for target in targets)
        for name, _ in self.named_modules():
            if name.startswith("coupling_head.") and f".{name}".endswith(ends):
                raise _not_on(name)
        start = getattr(adapter_config, "init_lora_weights", True)
        if start in CHANGING_STARTS and len(self.heads) > 1:
            raise ValueError(
                f"`init_lora_weights` {start!r} changes the backbone's weights, which the heads "
                f"{self.heads} share: use True."
            )
        add_adapter(self.backbone, adapter_config, adapter_name or "default")

    def load_adapter(
        self, adapter: str | Path, adapter_name: str | None = None, **hub: Any
    ) -> None:
        """Loads a stored LoRA into the backbone, where it is active and frozen.

        Args:
            adapter: a folder or an id on the Hub, of the adapter or of a head that has one.
            adapter_name: what to call it.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: there is no adapter, or it is damaged.
            ValueError: it is of an unsupported kind, or of another backbone.
        """
        from .loading import load_adapter

        load_adapter(self.backbone, adapter, adapter_name or "default", **hub)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one.

        Raises:
            ValueError: there is no such adapter.
        """
        self._check_adapter(adapter_name)
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
        """Removes adapters of these names.

        Raises:
            ValueError: there is no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            self._check_adapter(name)
        for name in names:
            delete_adapter(self.backbone, name)

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """An adapter's weights, as PEFT stores them, without its name; default, the active one's.

        Raises:
            ValueError: there is no such adapter.
        """
        name = (self.active_adapters() or [None])[0] if adapter_name is None else adapter_name
        self._check_adapter(name)
        return adapter_state_dict(self.backbone, name)

    def _check_adapter(self, name: str | None) -> None:
        there = getattr(self.backbone, "peft_config", {})
        if name not in there:
            known = ", ".join(map(repr, there)) or "none"
            raise ValueError(f"There is no adapter {name!r}: the backbone's adapters are {known}.")
