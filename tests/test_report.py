"""Promises of the page of all measures."""

from __future__ import annotations

import importlib.util
import json

from codd_hf.cli import main
from codd_hf.evaluation import ReportSettings, gap
from tiny import SENTENCES
from tiny_pipeline import save_tiny_pipeline

ESTIMATE = {"value": 40.0, "error": 2.0}
WAY = {"sampling": "factorized", "strategy": "margin", "passes": 2}
ANSWERS = {
    "environment": {"torch": "2"},
    "settings": {},
    "facts": {"problems": 3},
    "rows": [WAY | {"right, %": ESTIMATE, "tokens per pass": {"value": 1.5, "error": None}}],
    "AUP": [{"sampling": "factorized", "AUP": 60.0}],
}
OVERHEAD = [{"vocabulary": size, "evidence": "exact", "overhead, %": 1.0} for size in (10, 100)]
BENCH = {
    "environment": {"torch": "2"},
    "benchmarks": {"overhead": {"facts": {"repeats": 5}, "rows": OVERHEAD}},
}


def test_page_and_plots_are_made_of_results_that_are_there(tmp_path, capsys):
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    (tmp_path / "gap.json").write_text('{"rows": [{"ratio": 0.5}]}')  # of an older version
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    argv = ["evaluate", "report", "--output", str(tmp_path), "--measures"]
    assert main([*argv, "--overhead", str(tmp_path / "bench.json")]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| factorized | margin | 2 | 40 ± 2 | 1.5 |" in page
    assert "problems 3" in page
    names = ["accuracy", "overhead", "parallelism"]
    assert "## Gap" not in page
    assert all(f'srcset="{name}_dark.svg"' in page for name in names)
    made = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert sorted(made) == [f"{name}_{theme}.svg" for name in names for theme in ("dark", "light")]
    assert main([*argv, "--overhead", str(tmp_path / "bench.json")]) == 0
    assert made == {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}


def test_measure_whose_result_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    rows = [{"question": "?", "answer": sentence} for sentence in SENTENCES]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["evaluate", "report", "--output", str(tmp_path / "report"), "--model", str(folder)]
    argv += ["--measures", "gap"]
    assert main([*argv, "--num-problems", "2"]) == 0
    assert (tmp_path / "report" / "gap_dark.svg").exists()
    measured, measure = [], gap.measure

    def counted(pipeline, examples, settings):
        measured.append(len(examples))
        return measure(pipeline, examples, settings)

    monkeypatch.setattr(gap, "measure", counted)
    assert main([*argv, "--num-problems", "2"]) == 0
    assert measured == []
    assert main([*argv, "--num-problems", "1"]) == 0
    assert measured == [1]


def test_report_without_matplotlib_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "codd_hf.evaluation.plots.find_spec", lambda name: None if "plot" in name else find(name)
    )
    assert main(["evaluate", "report", "--output", str(tmp_path / "report")]) == 1
    assert "`pip install codd-hf[plots]`" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_measures_get_the_flags_that_they_know():
    parts = ReportSettings(judge="x", judge_file="y", num_problems=3).parts()
    assert list(parts) == ["gap", "answers", "joint", "quality"]
    assert [parts[name].num_problems for name in ("gap", "answers", "quality")] == [3, 3, 3]
    assert parts["quality"].judge_file == "y"
    assert parts["joint"].output == "report/joint.json"
