"""Coupled Discrete Diffusion (CoDD): coherent parallel text from diffusion language models."""

import importlib
from typing import TYPE_CHECKING, Any

from .hub import registration as registration

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .circuits import CoupledCategorical as CoupledCategorical
    from .circuits import Potentials as Potentials
    from .configuration_codd import CoDDConfig as CoDDConfig
    from .configuration_codd import CoDDHeadConfig as CoDDHeadConfig
    from .decoding.diffusion_gemma import CoDDGenerationConfig as CoDDGenerationConfig
    from .decoding.diffusion_gemma import CoupledBoundSamplerConfig as CoupledBoundSamplerConfig
    from .hub.repositories import default_model as default_model
    from .modeling_codd import CoDDModel as CoDDModel
    from .modeling_codd import CoDDOutput as CoDDOutput
    from .modeling_diffusion_gemma import CoDDDiffusionGemma as CoDDDiffusionGemma
    from .modeling_head import CoDDHead as CoDDHead
    from .pipelines.pipeline_codd import CoDDPipeline as CoDDPipeline
    from .pipelines.pipeline_output import CoDDPipelineOutput as CoDDPipelineOutput
    from .schedulers.scheduling_codd import CoDDScheduler as CoDDScheduler
    from .schedulers.scheduling_codd import CoDDSchedulerOutput as CoDDSchedulerOutput

_EXPORTS = {
    "CoDDConfig": "configuration_codd",
    "CoDDDiffusionGemma": "modeling_diffusion_gemma",
    "CoDDGenerationConfig": "decoding.diffusion_gemma",
    "CoDDHead": "modeling_head",
    "CoDDHeadConfig": "configuration_codd",
    "CoDDModel": "modeling_codd",
    "CoDDOutput": "modeling_codd",
    "CoDDPipeline": "pipelines.pipeline_codd",
    "CoDDPipelineOutput": "pipelines.pipeline_output",
    "CoDDScheduler": "schedulers.scheduling_codd",
    "CoDDSchedulerOutput": "schedulers.scheduling_codd",
    "CoupledBoundSamplerConfig": "decoding.diffusion_gemma",
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
