"""Schedulers: which tokens a denoising step commits, and what they are drawn from."""

from .remasking import CommitMemory
from .row_text import RowText
from .scheduler_output import CoDDSchedulerOutput
from .scheduling_codd import CoDDScheduler

__all__ = ["CoDDScheduler", "CoDDSchedulerOutput", "CommitMemory", "RowText"]
