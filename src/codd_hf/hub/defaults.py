"""The embedded default: a small coupled model that comes with the package."""

from __future__ import annotations

from pathlib import Path


def default_model() -> str:
    """Path of the embedded pipeline: a 4 M-parameter diffusion LM of grade-school arithmetic.

    It holds `model/`, `scheduler/`, `tokenizer/`, the head before its conditional fit in `stage1/`,
    and held-out problems, in `test.jsonl` and `demo.jsonl`.
    """
    return str(Path(__file__).parents[1] / "default_model")
