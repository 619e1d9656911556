"""Makes transformers' Auto classes know CoDD, without importing transformers before its time.

`import codd_hf` takes milliseconds, transformers takes seconds. So nothing is registered until
transformers' own tables of configurations and models are imported, by whoever needs them; and the
tables hold stand-ins that import the models only when one is loaded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any


def register_when_needed() -> None:
    """Registers CoDD with the Auto classes, now or as soon as transformers' tables exist."""
    tables = "transformers.models.auto."
    waiting = {
        f"{tables}configuration_auto": lambda: _of("configuration_codd"),  # registers its own
        f"{tables}modeling_auto": _register_models,
    }
    for name in waiting.keys() & sys.modules.keys():
        waiting.pop(name)()
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(MetaPathFinder):
    """Runs an action right after a module has been imported, whoever imports it."""

    def __init__(self, waiting: dict[str, Callable[[], Any]]):
        self.waiting = waiting

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (f.find_spec(fullname, path, target) for f in others)), None)
        if spec is not None:
            execute, action = spec.loader.exec_module, self.waiting.pop(fullname)
            spec.loader.exec_module = lambda module: (execute(module), action())
        return spec


def _of(module: str) -> Any:
    return importlib.import_module(f".{module}", __package__)


def _register_models() -> None:
    from transformers.models.auto import modeling_auto

    def stand_in(module: str, name: str, config_class: type) -> type:
        """Stands for a model until its module, which registers the real one, is imported."""

        def calling(method: str) -> classmethod:
            return classmethod(
                lambda cls, *args, **kwargs: getattr(getattr(_of(module), name), method)(
                    *args, **kwargs
                )
            )

        methods = {method: calling(method) for method in ("from_pretrained", "_from_config")}
        return type(name, (), {"config_class": config_class, **methods})

    configs = _of("configuration_codd")
    model = stand_in("modeling_codd", "CoDDModel", configs.CoDDConfig)
    head = stand_in("modeling_head", "CoDDHead", configs.CoDDHeadConfig)
    modeling_auto.AutoModel.register(configs.CoDDConfig, model, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(configs.CoDDConfig, model, exist_ok=True)
    modeling_auto.AutoModel.register(configs.CoDDHeadConfig, head, exist_ok=True)
