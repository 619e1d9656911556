"""Which families and layouts there are."""

from __future__ import annotations

from typing import Any

from .custom_code import CustomCodeFamily
from .decoder import DecoderFamily
from .dream import DreamLayout
from .family import FAMILIES
from .layout import CheckpointLayout
from .llada import LLaDALayout
from .masked_lm import MaskedLMFamily

FAMILIES += [CustomCodeFamily(), DecoderFamily(), MaskedLMFamily()]
LAYOUTS: list[CheckpointLayout] = [LLaDALayout(), DreamLayout()]


def layout_of(config: dict[str, Any]) -> CheckpointLayout | None:
    """The foreign layout that the content of a `config.json` describes, if it is one."""
    return next((layout for layout in LAYOUTS if layout.reads(config)), None)
