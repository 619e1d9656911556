"""Evaluation: what coupling gains over factorized prediction, measured on held-out text.

A measure is a module with a function `measure(pipeline, examples, settings)` that gives a
[`~codd_hf.runtime.report.Report`]. The command line makes its flags of its settings, loads pipeline
and examples, and writes the result.
"""

from __future__ import annotations

from .settings import GapSettings, MeasureSettings, QualitySettings

MEASURES: dict[str, type[MeasureSettings]] = {"gap": GapSettings, "quality": QualitySettings}
"""The settings of each measure by the name of its module."""
