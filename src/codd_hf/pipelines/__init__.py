"""Pipelines: text in, text out."""

from .pipeline_codd import CoDDPipeline
from .pipeline_output import CoDDPipelineOutput
