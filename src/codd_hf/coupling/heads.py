"""Several heads on one backbone, one of them the default; named and switched as PEFT's adapters.

Which head couples a call is settled once, when the call begins, and travels with it: threads share
a model, and what one of them sets concerns the calls that begin later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..backbones import execution_device
from ..checks.arguments import shown
from ..configuration_codd import CoDDHeadConfig
from ..hub.cards import Artifact
from ..hub.publishing import push
from ..hub.repositories import ADAPTER_FOLDER, Repository, checked_name
from .adapter_files import save_adapter
from .adapters import (
    adapter_in_use,
    check_backbone_is_whole,
    delete_adapter,
    enable_adapters,
    set_adapter,
)
from .loading import load_adapter, load_head

if TYPE_CHECKING:
    from ..modeling_head import CoDDHead, FrozenHead

DEFAULT_NAME = "default"

HeadName = str | bool | None
"""Of a call: the name of a head; None, the model's default; False, none."""


class CallHead(NamedTuple):
    """What couples the predictions of a call.

    Attributes:
        name: the head whose window and adapter the call has; None if the model has no head.
        module: the head; None leaves predictions factorized.
        window_length: length of a window.
    """

    name: str | None
    module: CoDDHead | FrozenHead | None
    window_length: int

    def frozen(self) -> CallHead:
        """The same, for many windows: what inference derives from the head is derived once."""
        return self if self.module is None else self._replace(module=self.module.frozen())


class ModelLock:
    """A reentrant lock; a model that is copied or unpickled gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()


class HeadsMixin:
    """`load_head`, `set_head`, `disable_head`, `delete_head` and `save_head` of a [`CoDDModel`].

    The active head is the submodule `coupling_head`, and its configuration is the model's
    `head_config`. The others are kept aside: they are not among the model's parameters, and
    `save_pretrained` writes the active one alone.

    Calls in several threads may name different heads (`head=`). Where heads have adapters, passes
    of the backbone take turns; one with an adapter is to be loaded or deleted while no call runs.
    """

    def _start_heads(self) -> None:
        self._heads: dict[str, CoDDHead | None] = {}  # None stands for the active one
        self._head_name: str | None = None
        self._switched_off: set[object] = set()  # by whom; not a flag, which the first would reset
        self._adapted_heads: set[str] = set()
        self._lock = ModelLock()
        if self.coupling_head is not None:
            self._heads[DEFAULT_NAME] = None
            self._head_name = DEFAULT_NAME

    @property
    def heads(self) -> list[str]:
        """The names of the heads on this backbone, in the order in which they came."""
        return list(self._heads)

    @property
    def active_head(self) -> str | None:
        """The name of the head that couples predictions; None if there is none, or it is off."""
        return None if self._switched_off else self._head_name

    def head_of_call(self, head: HeadName | CallHead = None) -> CallHead:
        """What couples a call that begins now.

        Args:
            head: the name of a head; None, the model's default; False, none: the window is then the
                default head's, and so is the backbone's adapter. What was settled before stays.

        Raises:
            TypeError: it is none of these.
            ValueError: there is no such head.
        """
        if isinstance(head, CallHead):
            return head
        if not (head is None or head is False or isinstance(head, str)):
            raise TypeError(
                "`head` must be the name of a head, None (the model's default) or False (none), "
                f"got {shown(head)}."
            )
        named = isinstance(head, str)
        with self._lock:
            if named:
                self._check_name(head)
            off = head is False or (not named and bool(self._switched_off))
            name = head if named else self._head_name
            aside = self._heads.get(name)
            module = self.coupling_head if aside is None else self._placed(aside)
            length = self.window_length if module is None else module.config.window_length
            if module is not None and not off:
                self.bind(module)
            return CallHead(name, None if off else module, length)

    def bind(self, head: CoDDHead) -> None:
        """Gives tied emissions the output embedding; where that is offloaded, a copy, once."""
        if head.config.emission != "tied":
            return
        embedding = self.get_output_embeddings()
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
        """Runs a pass of the backbone with the adapter that belongs to the head of a call.

        The default head's passes meet the adapters as they are set. Other heads' have their own
        adapter or none; it is put back as it was at the end.

        Raises:
            ValueError: the adapter is another one than the default head's, and the pass would be
                repeated later, when gradients are computed.
        """
        if not self._adapted_heads:
            yield
            return
        with self._lock:
            if head.name == self._head_name:
                yield
                return
            repeated = any(getattr(m, "gradient_checkpointing", 0) for m in self.backbone.modules())
            if repeated and torch.is_grad_enabled():
                raise ValueError(
                    f"`head` {head.name!r} has another adapter than the default head: it cannot be "
                    "trained with gradient checkpointing, which repeats passes, but after "
                    f"`set_head({head.name!r})`."
                )
            name = head.name if head.name in self._adapted_heads else None
            with adapter_in_use(self.backbone, name):
                yield

    def load_head(
        self,
        head: CoDDHead | CoDDHeadConfig | str | Path,
        name: str = DEFAULT_NAME,
        adapter: str | Path | None = None,
        **hub: Any,
    ) -> None:
        """Adds a head; it becomes active only if the model has none.

        Args:
            head: a head; a folder or an id of one, of a model that has one, or of a PyJuice
                circuit; a configuration makes a new one. Its window length and structure may differ
                from the other heads'.
            name: what to call it.
            adapter: folder or id of a PEFT LoRA that belongs to the head and is active together
                with it; default, the one beside the head (`adapter/`), if there is one.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            TypeError: the head is none of these, or the name is no text.
            ValueError: the name is taken, or head or adapter do not fit the backbone.
            OSError: nothing is found.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"`name` must be a text that is not empty, got {name!r}.")
        if name in self._heads:
            raise ValueError(
                f"`name` {name!r} is taken: choose another one, or `delete_head({name!r})` first."
            )
        if self._heads:
            check_backbone_is_whole(self.backbone, f"the head {name!r}")
        loaded = load_head(head, self.backbone, self.config.mask_token_id, **hub)
        if self.config.mask_token_id is None:
            self.config.mask_token_id = loaded.config.mask_token_id
        if adapter is None and isinstance(head, str | Path):
            adapter = Repository(checked_name(head, "head"), hub).adapter()
        with self._lock:
            if adapter is not None:
                load_adapter(self.backbone, adapter, name, **hub)
                self._adapted_heads.add(name)
            self._heads[name] = loaded
            if self._head_name is None:
                self.set_head(name)
            else:
                self._switch_adapter(self._head_name)

    def set_head(self, name: str) -> None:
        """Makes a head the default of later calls, with its adapter if it has one.

        It ends what `disable_head` began. A call names a head for itself by `head=name`.

        Raises:
            ValueError: there is no such head, or PEFT is training the one that is active.
        """
        with self._lock:
            self._check_name(name)
            if name != self._head_name:
                self._set_aside()
                head, self._heads[name] = self._placed(self._heads[name]), None
                self.coupling_head = head.train(self.training)
                self.config.head_config = head.config
                self._head_name = name
            self._switched_off.clear()
            self._switch_adapter(name)

    def disable_head(self) -> ExitStack:
        """Switches the head off for later calls: predictions are factorized until `set_head`.

        As a context manager, it is switched on again at the end:

            with model.disable_head():
                baseline = model.generate(input_ids)

        That holds for all threads; a call alone goes without by `head=False`. The window stays the
        head's, and so does the backbone's adapter; a model that is saved keeps its head.
        """
        who, restored = object(), ExitStack()
        self._switched_off.add(who)
        restored.callback(self._switched_off.discard, who)
        return restored

    def delete_head(self, name: str) -> None:
        """Removes a head and its adapter; without an active head, predictions are factorized.

        Raises:
            ValueError: there is no such head, or PEFT is training it.
        """
        with self._lock:
            self._check_name(name)
            if name in self._adapted_heads:
                delete_adapter(self.backbone, name)
                self._adapted_heads.remove(name)
            if name == self._head_name:
                self._set_aside()
                self.coupling_head = self.config.head_config = self._head_name = None
            del self._heads[name]

    def save_head(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the active head as a small repository of its own, with the backbone's LoRA if any.

        `CoDDModel.from_pretrained(save_directory)` brings both back, over the backbone that the
        head's configuration names: by default where this one was loaded from.

        Args:
            save_directory: a folder; the adapter goes into its `adapter/`.
            **kwargs: for the head's `save_pretrained`; with `push_to_hub=True` and a `repo_id` both
                are uploaded.

        Raises:
            ValueError: the model has no head.
        """
        if self.coupling_head is None:
            raise ValueError("The model has no head to save: add one with `load_head`.")
        head, base = self.coupling_head, self.backbone.name_or_path or None
        if head.config.base_model_name_or_path is None:
            head.config.base_model_name_or_path = base
        to_hub, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)

        def save(folder: str | Path) -> None:
            with self._lock:
                save_adapter(self, Path(folder, ADAPTER_FOLDER), base)
            head.save_pretrained(folder)

        save(save_directory)
        if to_hub:
            name = repo_id or Path(save_directory).resolve().name
            push(Artifact("head", head), save, name, **kwargs)

    def _check_name(self, name: str) -> None:
        if name not in self._heads:
            there = ", ".join(repr(n) for n in self._heads) or "none"
            raise ValueError(f"`head`: there is no head {name!r}: the model's heads are {there}.")

    def _apply(self, fn, recurse: bool = True) -> HeadsMixin:
        # The heads kept aside, which are no submodules, go where the model goes.
        for head in getattr(self, "_heads", {}).values():
            if head is not None:
                head._apply(fn)
        return super()._apply(fn, recurse)

    def _placed(self, head: CoDDHead) -> CoDDHead:
        """A head kept aside, on the device of the backbone."""
        device = execution_device(self.backbone)
        return head if head.device == device else head.to(device)

    def _set_aside(self) -> None:
        """Takes the active head off the model."""
        if hasattr(self.coupling_head, "modules_to_save"):
            raise ValueError(
                f"The head {self._head_name!r} is being trained by PEFT (`modules_to_save`): merge "
                "or unload the adapter first."
            )
        if self._head_name is not None:
            self._heads[self._head_name] = self.coupling_head

    def _switch_adapter(self, name: str) -> None:
        """Activates the adapter that belongs to a head; the user's own ones are left alone."""
        if name in self._adapted_heads:
            set_adapter(self.backbone, name, train=False)
        elif self._adapted_heads:
            enable_adapters(self.backbone, False)
