"""Sharing: model cards, pushing to the Hub, and the code that a repository can carry along."""

from .cards import make_card
from .export import export_code
from .publishing import HeadPublishing, ModelPublishing, PipelinePublishing

__all__ = [
    "HeadPublishing",
    "ModelPublishing",
    "PipelinePublishing",
    "export_code",
    "make_card",
]
