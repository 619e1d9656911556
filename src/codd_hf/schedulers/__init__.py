"""Schedulers: which tokens a denoising step commits, and what they are drawn from."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "CoDDScheduler": ".scheduling_codd",
    "CoDDSchedulerOutput": ".scheduler_output",
    "CommitMemory": ".remasking",
    "RowText": ".row_text",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
