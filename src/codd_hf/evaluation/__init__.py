"""Evaluation: what coupling gains over factorized prediction, measured on held-out text.

A measure is a module with a function `measure(pipeline, examples, settings)` that gives a
[`~codd_hf.runtime.report.Report`], and its settings, a class in `settings`. The command line makes
its flags of them, loads pipeline and examples, and writes the result.
"""
