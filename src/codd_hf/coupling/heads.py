"""Several heads on one backbone, by name; and from a name, a folder or an id to a head.

The head that couples a call is settled once, when the call begins, and travels with it, so that
threads can share a model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..backbones import layout_of, needs_remote_code
from ..checks.arguments import shown
from ..configuration_codd import CoDDHeadConfig
from ..conversion import convert_jpc, holds_circuit
from ..hub.cards import Artifact
from ..hub.publishing import ACCESS, FACTS, UPLOAD, push
from ..hub.repositories import (
    ADAPTER_FOLDER,
    CACHE_ARGUMENTS,
    HUB_ARGUMENTS,
    Repository,
    checked_name,
    is_local,
    locate,
)
from ..modeling_head import CoDDHead
from .adapter_files import load_adapter, save_adapter, write_adapter
from .adapters import (
    active_state,
    adapter_configs,
    adapter_in_use,
    delete_adapter,
    refuse_changes,
    restore,
    starts_of,
)

if TYPE_CHECKING:
    from ..modeling_head import FrozenHead
    from .windows import CoupledBackbone

DEFAULT_NAME = "default"
OWN_ARGUMENTS = ("coupling", "mask_token_id", "forbidden_token_ids")
BACKBONE_ARGUMENTS = (
    *CACHE_ARGUMENTS,
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "offload_folder",
    "attn_implementation",
    "quantization_config",
)

HeadName = str | bool | None
"""Of a call: the name of a head; None, the default one; False, none."""


class CallHead(NamedTuple):
    """The head of a call.

    Attributes:
        name: the head whose window and adapter the call has.
        module: the head; None leaves predictions factorized.
        window_length: length of a window.
    """

    name: str
    module: CoDDHead | FrozenHead | None
    window_length: int

    def frozen(self) -> CallHead:
        """The same, for many windows: what inference derives from the head is derived once."""
        return self if self.module is None else self._replace(module=self.module.frozen())


@dataclass(eq=False, repr=False)
class Heads:
    """The heads of a [`CoDDModel`], by name.

    `"default"` is the submodule `coupling_head`: calls that name no head have it, and it alone is
    saved with the model. The others are not among the model's parameters. A LoRA belongs to the
    head of its name; where heads have adapters of their own, passes of the backbone take turns.
    """

    of: weakref.ref[CoupledBackbone]  # no cycle: a model that is let go frees its memory at once
    others: dict[str, CoDDHead] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def model(self) -> CoupledBackbone:
        """The model that has the heads."""
        return self.of()

    def __getstate__(self) -> tuple[CoupledBackbone, dict[str, CoDDHead]]:
        return self.model, self.others

    def __setstate__(self, state: tuple[CoupledBackbone, dict[str, CoDDHead]]) -> None:
        self.__init__(weakref.ref(state[0]), state[1])  # with a lock of its own

    def __iter__(self) -> Iterator[str]:
        default = () if self.model.coupling_head is None else (DEFAULT_NAME,)
        return iter((*default, *self.others))

    def __len__(self) -> int:
        return (self.model.coupling_head is not None) + len(self.others)

    def __getitem__(self, name: str) -> CoDDHead:
        if name not in self:
            there = ", ".join(map(repr, self)) or "none"
            raise ValueError(f"`head`: there is no head {name!r}: the model's heads are {there}.")
        return self.model.coupling_head if name == DEFAULT_NAME else self.others[name]

    def of_call(self, head: HeadName = None) -> CallHead:
        """The head of a call that begins now; with False, window and adapter are the default's."""
        if not (head is None or head is False or isinstance(head, str)):
            raise TypeError(
                "`head` must be the name of a head, None (the model's default) or False (none), "
                f"got {shown(head)}."
            )
        name = head if isinstance(head, str) else DEFAULT_NAME
        module = self[name] if isinstance(head, str) else self.model.coupling_head
        length = self.model.window_length if module is None else module.config.window_length
        if module is None or head is False:
            return CallHead(name, None, length)
        self.bind(module)
        return CallHead(name, module, length)

    def bind(self, head: CoDDHead) -> None:
        """Gives tied emissions the output embedding; where that is offloaded, a copy, once."""
        if head.config.emission != "tied":
            return
        embedding = self.model.get_output_embeddings()
        if not embedding.weight.is_meta:
            head.bind(embedding.weight)
        elif not head._bound:
            embedding._hf_hook.pre_forward(embedding)  # accelerate's, which fetches the weight
            try:
                head.bind(embedding.weight)
            finally:
                embedding._hf_hook.post_forward(embedding, None)

    @contextmanager
    def adapter_of_call(self, head: CallHead) -> Iterator[None]:
        """Runs a pass of the backbone with the adapter of the head of a call, if it has one.

        The default head's passes meet the adapters as they are set.
        """
        backbone = self.model.backbone
        adapters = adapter_configs(backbone).keys()
        if not self.others or not adapters & {*self}:
            yield
            return
        with self.lock:
            if head.name == DEFAULT_NAME:
                yield
                return
            repeated = any(getattr(m, "gradient_checkpointing", 0) for m in backbone.modules())
            if repeated and torch.is_grad_enabled():
                raise ValueError(
                    f"`head` {head.name!r} has another adapter than the default head: it cannot be "
                    "trained with gradient checkpointing, which repeats passes, but as the default "
                    "head of a model."
                )
            with adapter_in_use(backbone, head.name if head.name in adapters else None):
                yield

    def load(
        self,
        head: CoDDHead | CoDDHeadConfig | str | Path,
        name: str = DEFAULT_NAME,
        adapter: str | Path | None = None,
        **hub: Any,
    ) -> None:
        """Adds a head, for calls that name it by `head=name`; `"default"` is that of all others.

        Args:
            head: as for [`CoDDModel.from_backbone`]; its window and structure may differ from the
                other heads'.
            name: of the head.
            adapter: as for `from_backbone`; it runs together with the head.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: the name is taken, or head or adapter do not fit the backbone.
        """
        model = self.model
        if not isinstance(name, str) or not name:
            raise TypeError(f"`name` must be a text that is not empty, got {name!r}.")
        if name in self:
            raise ValueError(
                f"`name` {name!r} is taken: choose another one, or `delete_head({name!r})` first."
            )
        if len(self):
            refuse_changes(starts_of(model.backbone))
        loaded = load_head(head, model.backbone, model.config.mask_token_id, **hub)
        if adapter is None and isinstance(head, str | Path):
            adapter = Repository(checked_name(head, "head"), hub).adapter()
        with self.lock:
            if adapter is not None:
                before = active_state(model.backbone)
                load_adapter(model.backbone, adapter, name, shared=len(self) > 0, **hub)
                if name != DEFAULT_NAME:
                    restore(model.backbone, before)
            if model.config.mask_token_id is None:
                model.config.mask_token_id = loaded.config.mask_token_id
            if name == DEFAULT_NAME:
                model.coupling_head, model.config.head_config = loaded, loaded.config
            else:
                self.others[name] = loaded

    def delete(self, name: str) -> None:
        """Removes a head and its adapter."""
        with self.lock:
            if self[name] is not None and name in adapter_configs(self.model.backbone):
                delete_adapter(self.model.backbone, name)
            if name == DEFAULT_NAME:
                self.model.coupling_head = self.model.config.head_config = None
            else:
                del self.others[name]

    def save(self, save_directory: str | Path, name: str = DEFAULT_NAME, **kwargs: Any) -> None:
        """Saves a head as a small repository of its own, with its LoRA, if any, in `adapter/`.

        `CoDDModel.from_pretrained(save_directory)` brings both back, over the backbone that the
        head's configuration names: by default where this one was loaded from.

        Args:
            save_directory: a folder.
            name: of the head.
            **kwargs: for the head's `save_pretrained`, `push_to_hub` among them.
        """
        if not len(self):
            raise ValueError("The model has no head to save: add one with `load_head`.")
        model, head, base = self.model, self[name], self.model.backbone.name_or_path or None
        if head.config.base_model_name_or_path is None:
            head.config.base_model_name_or_path = base
        to_hub = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
        access = {key: kwargs.pop(key) for key in ACCESS if key in kwargs}
        upload = {key: kwargs.pop(key) for key in UPLOAD if key in kwargs}

        def save(folder: str | Path) -> None:
            adapter = Path(folder, ADAPTER_FOLDER)
            with self.lock:
                if name == DEFAULT_NAME:
                    save_adapter(model, adapter, base)
                elif name in adapter_configs(model.backbone):
                    write_adapter(model.backbone, name, adapter, base)
            head.save_pretrained(folder, **kwargs)

        save(save_directory)
        if to_hub:
            facts = {key: kwargs[key] for key in FACTS if key in kwargs}
            push(Artifact("head", head), save, repo_id, upload=upload, **access, **facts)


def load_head(
    head: CoDDHead | CoDDHeadConfig | str | Path,
    backbone: PreTrainedModel,
    mask_token_id: int | None = None,
    **hub: Any,
) -> CoDDHead:
    """A head for a backbone; `head` and `hub` are as for [`CoDDModel.from_backbone`].

    Args:
        head: a head, its configuration, or its folder or id.
        backbone: the model that it is for.
        mask_token_id: the mask token, for a head that does not know it; default the backbone's.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        TypeError: it is no head.
        ValueError: it does not fit the backbone.
    """
    config = backbone.config
    if mask_token_id is None:
        mask_token_id = getattr(config, "mask_token_id", None)
    if isinstance(head, CoDDHeadConfig):
        head = CoDDHead(head)
    elif isinstance(head, str | Path):
        name = checked_name(head, "head")
        if holds_circuit(name, **hub):
            base = backbone.name_or_path or None
            hub |= {"mask_token_id": mask_token_id, "base_model_name_or_path": base}
            head = convert_jpc(name, **hub)
        else:
            head = CoDDHead.from_pretrained(name, **hub)
    if getattr(getattr(head, "config", None), "model_type", None) != CoDDHeadConfig.model_type:
        raise TypeError(
            "`head` must be a CoDD head, its configuration, or the folder or id of one, got "
            f"{type(head).__name__}."
        )
    for what, found, wanted in (
        ("a vocabulary of {} tokens", head.config.vocab_size, config.vocab_size),
        ("hidden states of size {}", head.config.context_size, config.hidden_size),
    ):
        if found not in (None, wanted):
            raise ValueError(
                f"`head` was made for {what.format(found)}, but the backbone has {wanted}: use a "
                "head that was fitted to this backbone."
            )
    if head.config.mask_token_id is None:
        head.config.mask_token_id = mask_token_id
    return head


def named_backbone(
    name: str, head: CoDDHeadConfig, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The backbone that a head's configuration names, and the arguments to load it with.

    Of the user's arguments `kwargs` for the head in `name`, it gets those that say how to load and
    where to cache, none that grant anything.

    Raises:
        ValueError: the head names no backbone, or one that the user has to name: a local path (in a
            downloaded head), or a repository whose code would have to run.
        TypeError: an argument is of no use.
    """
    base, advice = head.base_model_name_or_path, "`CoDDModel.from_backbone(backbone, head)`"
    if base is None:
        raise ValueError(
            f"The head {name!r} names no backbone (`base_model_name_or_path`): join them with "
            f"{advice}."
        )
    if not Path(name).exists() and is_local(base):
        raise ValueError(
            f"The downloaded head {name!r} names the local path {base!r} as its backbone: give "
            f"the backbone yourself, with {advice}."
        )
    passed_on = {*OWN_ARGUMENTS, *BACKBONE_ARGUMENTS}
    known = {*HUB_ARGUMENTS, *passed_on, "trust_remote_code"}
    if unknown := [k for k in kwargs if k not in known and not k.startswith("_")]:
        raise TypeError(
            f"`{unknown[0]}` cannot be given with a head's folder or id: load the backbone with it "
            f"and use {advice}."
        )
    own = {key: value for key, value in kwargs.items() if key in passed_on}
    if head.base_model_revision is not None:
        own["revision"] = head.base_model_revision
    base = checked_name(base, "base_model_name_or_path")
    found = locate(base, own).config
    if layout_of(found) is None and needs_remote_code(found):
        raise ValueError(
            f"The head {name!r} names the backbone {base!r}, which brings its own code: if you "
            f"trust that code, use `CoDDModel.from_backbone({base!r}, {name!r}, "
            "trust_remote_code=True)`."
        )
    return base, own
