"""Coupled Discrete Diffusion (CoDD): coherent parallel text from diffusion language models."""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration as registration

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .circuits import CoupledCategorical as CoupledCategorical
    from .circuits import Potentials as Potentials
    from .configuration_codd import CoDDConfig as CoDDConfig
    from .configuration_codd import CoDDHeadConfig as CoDDHeadConfig
    from .hub.repositories import default_model as default_model
    from .modeling_codd import CoDDModel as CoDDModel
    from .modeling_codd import CoDDOutput as CoDDOutput
    from .modeling_head import CoDDHead as CoDDHead
    from .pipelines.pipeline_codd import CoDDPipeline as CoDDPipeline
    from .pipelines.pipeline_output import CoDDPipelineOutput as CoDDPipelineOutput
    from .schedulers.scheduling_codd import CoDDScheduler as CoDDScheduler
    from .schedulers.scheduling_codd import CoDDSchedulerOutput as CoDDSchedulerOutput

_EXPORTS = {
    "CoDDConfig": "configuration_codd",
    "CoDDHead": "modeling_head",
    "CoDDHeadConfig": "configuration_codd",
    "CoDDModel": "modeling_codd",
    "CoDDOutput": "modeling_codd",
    "CoDDPipeline": "pipelines.pipeline_codd",
    "CoDDPipelineOutput": "pipelines.pipeline_output",
    "CoDDScheduler": "schedulers.scheduling_codd",
    "CoDDSchedulerOutput": "schedulers.scheduling_codd",
    "CoupledCategorical": "circuits",
    "Potentials": "circuits",
    "default_model": "hub.repositories",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
