"""Makes transformers' Auto classes know CoDD, without importing transformers before its time.

`import codd_hf` takes milliseconds, transformers takes seconds. So nothing is registered until
transformers' tables of configurations and models are imported, by whoever needs them; and the
tables hold stand-ins that import the models only when one is loaded.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from ..configuration_codd import CoDDConfig, CoDDHeadConfig

    model: Any = _StandIn(CoDDConfig, "modeling_codd", "CoDDModel")
    head: Any = _StandIn(CoDDHeadConfig, "modeling_head", "CoDDHead")
    AutoModel.register(CoDDConfig, model, exist_ok=True)
    AutoModelForCausalLM.register(CoDDConfig, model, exist_ok=True)
    AutoModel.register(CoDDHeadConfig, head, exist_ok=True)


class _StandIn:
    """Stands for a model until its module, which registers the real one, is imported."""

    def __init__(self, config_class: type, module: str, name: str) -> None:
        self.config_class, self.module, self.name = config_class, module, name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(f"codd_hf.{self.module}")
        return getattr(getattr(module, self.name), attribute)


class _AfterImport(MetaPathFinder):
    """Calls a function right after a module has been imported, whoever imports it."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self.name, self.function = name, function
        if name in sys.modules:
            function()
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(fullname)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), self.function())
        return spec


_AfterImport(
    "transformers.models.auto.configuration_auto",
    lambda: importlib.import_module("codd_hf.configuration_codd"),  # which registers its own
)
_AfterImport("transformers.models.auto.modeling_auto", _register_models)
