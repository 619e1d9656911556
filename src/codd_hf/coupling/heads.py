"""Several heads on one backbone, by name.

The head that couples a call is settled once, when the call begins, and travels with it, so that
threads can share a model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from ..checks.arguments import shown
from ..configuration_codd import CoDDConfig, CoDDHeadConfig
from ..hub.publishing import PUSHED, push
from ..hub.repositories import ADAPTER_FOLDER
from ..modeling_head import CoDDHead, FrozenHead
from .adapters import (
    active_adapter,
    active_state,
    adapter_configs,
    delete_adapter,
    load_adapter,
    save_adapter,
    switch,
)
from .loading import adapter_beside, load_head

DEFAULT_NAME = "default"
LOCKS: Any = weakref.WeakKeyDictionary()
"""One of each backbone."""

HeadName = str | bool | None
"""Of a call: the name of a head; None, the default one; False, none."""


class CallHead(NamedTuple):
    """The head of a call: window and adapter are of the head `name`; no module couples nothing."""

    name: str
    module: CoDDHead | FrozenHead | None
    window_length: int

    @property
    def reads_states(self) -> bool:
        """Whether the backbone's hidden states steer the circuit."""
        return self.module is not None and bool(self.module.config.conditioning)

    def frozen(self) -> CallHead:
        """The same, for many windows: what inference derives from the head is derived once."""
        return self if self.module is None else self._replace(module=self.module.frozen())


class WithHeads:
    """A backbone and its heads: those by name, and what a user does with them.

    `"default"` is the submodule `coupling_head`: calls that name no head have it, and it alone is
    saved with the model. The others are not among the model's parameters. A LoRA belongs to the
    head of its name; where heads have adapters of their own, passes of the backbone take turns.
    """

    config: CoDDConfig
    backbone: PreTrainedModel
    coupling_head: CoDDHead | None
    other_heads: dict[str, CoDDHead]

    @property
    def heads(self) -> dict[str, CoDDHead]:
        """The heads by name, the default one first."""
        default = {} if self.coupling_head is None else {DEFAULT_NAME: self.coupling_head}
        return default | self.other_heads

    @property
    def window_length(self) -> int:
        """Length of the default head's window; 32 without a head."""
        return 32 if self.coupling_head is None else self.coupling_head.config.window_length

    @property
    def adapter_lock(self) -> Any:
        """Held by what depends on the adapters that are active."""
        return LOCKS.setdefault(self.backbone, threading.RLock())

    def head_named(self, name: str) -> CoDDHead:
        """The head of a name, or a ValueError."""
        if not isinstance(name, str) or name not in self.heads:
            there = ", ".join(map(repr, self.heads)) or "none"
            raise ValueError(
                f"`head` must be the name of a head, None (the model's default) or False (none), "
                f"got {shown(name)}: the model's heads are {there}."
            )
        return self.heads[name]

    def head_of_call(self, head: HeadName = None) -> CallHead:
        """The head of a call that begins now; with False, window and adapter are the default's."""
        name: Any = DEFAULT_NAME if head is None or head is False else head
        if head is False or (head is None and self.coupling_head is None):
            return CallHead(name, None, self.window_length)
        module = self.head_named(name)
        self.bind_head(module)
        return CallHead(name, module, module.config.window_length)

    def bind_head(self, head: CoDDHead) -> None:
        """Gives tied emissions the output embedding."""
        if head.config.emission == "tied":
            embedding: Any = self.backbone.get_output_embeddings()
            with align_module_device(embedding):  # it may be offloaded
                head.bind(embedding.weight)

    @contextmanager
    def adapter_of_call(self, head: CallHead) -> Iterator[None]:
        """Runs a pass with the adapter of a call's head.

        A call with the default head uses the adapters that are active.
        """
        backbone = self.backbone
        adapters = adapter_configs(backbone).keys()
        if not self.other_heads or not adapters & self.heads.keys():
            yield
            return
        with self.adapter_lock:
            if head.name == DEFAULT_NAME:
                yield
                return
            repeated = any(getattr(m, "gradient_checkpointing", 0) for m in backbone.modules())
            if repeated and torch.is_grad_enabled():  # when another adapter may be active
                raise ValueError(
                    f"`head` {head.name!r} cannot be trained with gradient checkpointing: make it "
                    "the default head of a model."
                )
            before, own = active_state(backbone), [head.name] if head.name in adapters else []
            switch(backbone, own, on=bool(own))
            try:
                yield
            finally:
                switch(backbone, *before)

    def load_head(
        self,
        head: CoDDHead | CoDDHeadConfig | str | Path,
        name: str = DEFAULT_NAME,
        adapter: str | Path | None = None,
        **hub: Any,
    ) -> None:
        """Adds a head, for calls that name it by `head=name`; `"default"` is for all others.

        Head and adapter are as for `from_backbone`, and run together.

        Raises:
            ValueError: the name is taken, or head or adapter do not fit the backbone.
        """
        if not isinstance(name, str) or not name or name in self.heads:
            raise ValueError(
                f"`name` must be a text that is not the name of a head, got {name!r}: "
                f"`delete_head` makes room among {[*self.heads]}."
            )
        loaded = load_head(head, self.backbone, self.config.mask_token_id, **hub)
        adapter = adapter or adapter_beside(head, hub)
        with self.adapter_lock:
            if adapter is not None:
                before = active_state(self.backbone)
                load_adapter(self.backbone, adapter, name, **hub)
                if name != DEFAULT_NAME:
                    switch(self.backbone, *before)
            if self.config.mask_token_id is None:
                self.config.mask_token_id = loaded.config.mask_token_id
            if name == DEFAULT_NAME:
                self.coupling_head, self.config.head_config = loaded, loaded.config
            else:
                self.other_heads[name] = loaded

    def delete_head(self, name: str) -> None:
        """Removes a head and its adapter; without the default one, predictions are factorized."""
        with self.adapter_lock:
            self.head_named(name)  # raises for an unknown one
            if name in adapter_configs(self.backbone):
                delete_adapter(self.backbone, name)
            if name == DEFAULT_NAME:
                self.coupling_head = self.config.head_config = None
            else:
                del self.other_heads[name]

    def save_head(
        self, save_directory: str | Path, name: str = DEFAULT_NAME, **kwargs: Any
    ) -> None:
        """Saves a head as a small repository of its own, with its LoRA, if any, in `adapter/`.

        `CoDDModel.from_pretrained(save_directory)` brings both back, over the backbone that the
        head's configuration names: by default where this one was loaded from. `kwargs` are those of
        the head's `save_pretrained`, `push_to_hub` among them.
        """
        head, base = self.head_named(name), self.backbone.name_or_path or None
        if head.config.base_model_name_or_path is None:
            head.config.base_model_name_or_path = base
        to_hub = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)

        def write(folder: str | Path) -> None:
            with self.adapter_lock:
                adapter: str | None = name if name in adapter_configs(self.backbone) else None
                if name == DEFAULT_NAME:
                    adapter = active_adapter(self)
                save_adapter(self.backbone, adapter, Path(folder, ADAPTER_FOLDER), base)
            head.save_pretrained(folder, **kwargs)

        write(save_directory)
        if to_hub:
            given = {key: kwargs[key] for key in PUSHED if key in kwargs}
            push(head, write, repo_id, **given)
