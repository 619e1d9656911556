"""Schedulers: which tokens a denoising step commits, and what they are drawn from."""

from __future__ import annotations

from typing import Any

__all__ = ["CoDDScheduler", "CoDDSchedulerOutput", "CommitMemory", "RowText"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import scheduling_codd  # imports torch, for which the settings do not wait

    return getattr(scheduling_codd, name)
