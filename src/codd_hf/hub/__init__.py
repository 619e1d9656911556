"""Sharing: model cards and pushing to the Hub."""

from .cards import make_card
from .publishing import HeadPublishing, ModelPublishing, PipelinePublishing

__all__ = [
    "HeadPublishing",
    "ModelPublishing",
    "PipelinePublishing",
    "make_card",
]
