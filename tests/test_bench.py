"""Promises of the benchmarks: they run, their figures are sane, and the baseline is right."""

from __future__ import annotations

import json
import math

import pytest
import torch

from codd_hf.benchmarks import BENCHMARKS, median_seconds
from codd_hf.benchmarks.end_to_end import FACTORIZED
from codd_hf.cli import main

COLUMNS = {
    "overhead": "overhead, %",
    "head-step": "times faster",
    "end-to-end": "tokens/s",
    "block-cache": "tokens/s",
}
FAMILIES = (("SDAR-8B", 4), ("LLaDA2-mini", 32))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs_and_its_figures_are_sane(name, capsys, tmp_path):
    path = tmp_path / "figures.json"
    argv = ["bench", name, "--quick", "--repeats", "1", "--batch-size", "1"]
    assert main([*argv, "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"### {name}" in text
    assert "| ---" in text
    result = json.loads(path.read_text())
    assert result["environment"]["threads"] == torch.get_num_threads()
    rows = result["benchmarks"][name]["rows"]
    for row in rows:
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert all(math.isfinite(v) and v >= 0 for v in numbers)
        assert row[COLUMNS[name]] > 0
    if name == "block-cache":
        assert {row["tokens as LLaDA2Pipeline's, %"] for row in rows} == {100}
    if name != "end-to-end":
        return
    # Where both pipelines read the same they find the same tokens.
    same = {(row["blocks"], row["pipeline"]): row["tokens as LLaDA2Pipeline's, %"] for row in rows}
    assert same["single", FACTORIZED] == same["block-causal", FACTORIZED] == 100
    assert same["full", FACTORIZED] < 100  # it reads more


def test_overhead_is_measured_for_each_backbone_and_for_a_pass_over_a_block(tmp_path):
    path = tmp_path / "figures.json"
    argv = ["bench", "overhead", "--quick", "--repeats", "1", "--output", str(path)]
    assert main([*argv, "--backbones", "SDAR-8B", "LLaDA2-mini"]) == 0
    rows = json.loads(path.read_text())["benchmarks"]["overhead"]["rows"]
    shapes = [(row["backbone"], row["tokens of a pass"]) for row in rows[::2]]
    assert shapes == [(name, n) for name, block in FAMILIES for n in (512, block)]
    assert all(row["overhead, %"] > 0 for row in rows)


def test_overhead_is_measured_at_each_vocabulary_that_is_asked_for(tmp_path):
    path = tmp_path / "figures.json"
    argv = ["bench", "overhead", "--quick", "--repeats", "1", "--output", str(path)]
    assert main([*argv, "--vocabularies", "256", "1024"]) == 0
    rows = json.loads(path.read_text())["benchmarks"]["overhead"]["rows"]
    assert [row["vocabulary"] for row in rows] == [256, 256, 1024, 1024]


def test_sides_are_timed_in_turns():
    order = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert all(value >= 0 for value in median_seconds(sides, repeats=2, warmups=1).values())
    assert order == ["a", "b"] * 3
