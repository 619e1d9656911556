"""Coupled Discrete Diffusion (CoDD): coherent parallel text from diffusion language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .registration import register_when_needed

__version__ = "0.1.0"

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
    "default_model": "hub.defaults",
}

__all__ = [
    "CoDDConfig",
    "CoDDHead",
    "CoDDHeadConfig",
    "CoDDModel",
    "CoDDOutput",
    "CoDDPipeline",
    "CoDDPipelineOutput",
    "CoDDScheduler",
    "CoDDSchedulerOutput",
    "CoupledCategorical",
    "Potentials",
    "__version__",
    "default_model",
]

if TYPE_CHECKING:
    from .circuits import CoupledCategorical, Potentials
    from .configuration_codd import CoDDConfig, CoDDHeadConfig
    from .hub.defaults import default_model
    from .modeling_codd import CoDDModel, CoDDOutput
    from .modeling_head import CoDDHead
    from .pipelines.pipeline_codd import CoDDPipeline
    from .pipelines.pipeline_output import CoDDPipelineOutput
    from .schedulers.scheduling_codd import CoDDScheduler, CoDDSchedulerOutput


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_needed()
