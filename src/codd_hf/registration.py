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

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def register_when_needed() -> None:
    """Registers CoDD with the Auto classes, now or as soon as transformers' tables exist."""
    waiting = {CONFIGURATIONS: _register_configurations, MODELS: _register_models}
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)()
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(MetaPathFinder):
    """Runs an action right after a module has been imported, whoever imports it."""

    def __init__(self, waiting: dict[str, Callable[[], None]]):
        self.waiting = waiting

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (f.find_spec(fullname, path, target) for f in others)), None)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module) -> None:
            execute(module)
            action = self.waiting.pop(fullname, None)
            if action is not None:
                action()

        spec.loader.exec_module = execute_and_act
        return spec


def _register_configurations() -> None:
    importlib.import_module(".configuration_codd", __package__)  # registers what it defines


def _register_models() -> None:
    from transformers.models.auto import modeling_auto

    from .configuration_codd import CoDDConfig, CoDDHeadConfig

    class CoDDModel:
        """Stands for the model until its module, which registers the real one, is imported."""

        config_class = CoDDConfig

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            from .modeling_codd import CoDDModel

            return CoDDModel.from_pretrained(*args, **kwargs)

        @classmethod
        def _from_config(cls, config, **kwargs):
            from .modeling_codd import CoDDModel

            return CoDDModel._from_config(config, **kwargs)

    class CoDDHead:
        """Stands for the head until its module, which registers the real one, is imported."""

        config_class = CoDDHeadConfig

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            from .modeling_head import CoDDHead

            return CoDDHead.from_pretrained(*args, **kwargs)

        @classmethod
        def _from_config(cls, config, **kwargs):
            from .modeling_head import CoDDHead

            return CoDDHead._from_config(config, **kwargs)

    class HeadAlone:
        """Answers for a head, which by itself is no language model."""

        config_class = CoDDHeadConfig

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds a CoDD head alone, which is no "
                "language model: load it with its backbone by `CoDDModel.from_pretrained`, or by "
                "itself by `AutoModel.from_pretrained`."
            )

        @classmethod
        def _from_config(cls, config, **kwargs):
            raise ValueError(
                "`config` is that of a CoDD head alone, which is no language model: use "
                "`AutoModel.from_config`, or `CoDDModel.from_backbone(backbone, config)`."
            )

    modeling_auto.AutoModel.register(CoDDConfig, CoDDModel, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(CoDDConfig, CoDDModel, exist_ok=True)
    modeling_auto.AutoModel.register(CoDDHeadConfig, CoDDHead, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(CoDDHeadConfig, HeadAlone, exist_ok=True)
