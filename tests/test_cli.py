"""Promises of the command line: worked examples, exit codes, and what each command prints."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

import codd_hf
from codd_hf.cli import COMMANDS, main
from codd_hf.cli.demo import marked
from codd_hf.data.tasks import KINDS, Task

SHORT = ["--gen-length", "8", "--block-length", "4", "--num-inference-steps", "2"]


def python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def helped(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([*argv, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_commands_and_each_shows_an_example_and_debug(capsys):
    listed = helped(capsys)
    for command in COMMANDS:
        assert command in listed
        text = helped(capsys, command)
        assert f"example:\n  codd-hf {command}" in text
        assert "--debug" in text
    assert "--no-sequential" in helped(capsys, "evaluate", "gap")


def test_help_of_training_explains_its_flags_and_waits_for_no_torch(capsys):
    text = " ".join(helped(capsys, "train").split())
    assert "--num-latents LATENTS States of the circuit. (default 448)" in text
    assert "--conditional-max-steps" in text
    code = "import sys\nfrom codd_hf.cli import main\ntry:\n    main(['train', '--help'])\n"
    assert python(code + "except SystemExit:\n    print('torch' in sys.modules)").endswith("False")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["generate", "hello", "--gen-length", "many"],
        ["generate", "hello", "--unknown"],
        ["train", "--output", "x"],
        ["evaluate", "speed"],
    ],
)
def test_bad_usage_leaves_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    assert "usage: codd-hf" in capsys.readouterr().err


def test_generate_depends_on_the_seed_alone_and_reads_prompts_from_standard_input(
    trained_pipeline, capsys, monkeypatch
):
    argv = ["generate", "--model", str(trained_pipeline), *SHORT, "--temperature", "1"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*argv, "Where to?", "Where to?", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.StringIO("Where to?\n\nWhere to?\n"))
    assert main([*argv, "--seed", "1"]) == 0
    assert capsys.readouterr().out == texts[0] == texts[1] != texts[2]


def test_demo_prints_tasks_of_different_kinds_and_counts_right_answers(trained_pipeline, capsys):
    argv = ["demo", "--model", str(trained_pipeline), "--num-tasks", "20", "--passes", "1"]
    assert main(argv) == 0
    *shown, last = capsys.readouterr().out.strip().splitlines()
    assert sum(line.startswith(("factorized", "-")) for line in shown) == 2 * 4
    kinds = {line.partition(":")[0] for line in shown if line.partition(":")[0].lower() in KINDS}
    assert len(kinds) == 4
    pattern = r"20 unseen tasks, 1 pass a window: factorized \d+ right in [\d.]+ s, CoDD \d+ right"
    assert re.match(pattern, last)


def test_demo_marks_the_parts_of_an_answer():
    task = Task("sums", "3 * 4 + 1 = ?", "3*4=12\n12+1=13\n#### 13", "")
    assert marked(task, task.answer) == "3*4=12 ✓\n12+1=13 ✓\n#### 13 ✓\n✓ right"
    assert marked(task, "3*4=11\n#### 13\x1b") == "3*4=11 ✗\n#### 13\n✗ wrong"


def test_evaluate_gap_prints_the_table_and_reads_as_many_tokens_as_asked(
    trained_pipeline, tmp_path, capsys
):
    path = tmp_path / "gap.json"
    argv = ["evaluate", "gap", "--model", str(trained_pipeline), "--num-problems", "4"]
    argv += ["--output", str(path)]
    heads = [
        x for name in ("one", "two") for x in ("--head", f"{name}={trained_pipeline}/generative")
    ]
    assert main([*argv, "--ratios", "0.5", "1", *heads]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    for name in ("factorized", "raw product", "corrected", "one", "two", "fitted", "sequential"):
        assert name in header
    result = json.loads(path.read_text())
    assert [row["mask ratio"] for row in result["rows"]] == [0.5, 1.0]
    assert result["facts"]["examples"] == 4
    assert "torch" in result["environment"]

    def fitted(*options: str) -> float:
        assert main([*argv, "--ratios", "1", "--no-sequential", *options]) == 0
        (row,) = json.loads(path.read_text())["rows"]
        return row["fitted"]["value"]

    exact, one = fitted("--evidence-size", "0"), fitted("--evidence-size", "1")
    assert one != exact
    assert fitted("--evidence-size", "1000000") == pytest.approx(exact, abs=1e-4)


def test_train_writes_a_model_that_generate_takes(trained_pipeline, cities_jsonl, capsys, tmp_path):
    argv = ["train", "--dataset", str(cities_jsonl), "--output", str(tmp_path)]
    argv += ["--backbone", str(trained_pipeline.parent / "backbone"), "--num-latents", "6"]
    argv += ["--num-validation", "8", "--window-length", "4", "--generative-num-epochs", "1"]
    argv += ["--conditional-max-steps", "2", "--set", "conditional.tokens_per_batch=256"]
    assert main(argv) == 0
    folder = str(tmp_path / "pipeline")
    assert f"codd-hf generate --model {folder}" in capsys.readouterr().out
    assert main(["generate", "Where to?", "--model", folder, *SHORT]) == 0


def test_importing_the_package_is_cheap_and_every_public_name_is_there():
    heavy = {"torch", "transformers", "diffusers", "peft", "numpy"}
    assert python(f"import sys, codd_hf; print({heavy} & {{*sys.modules}})") == "set()"
    for name in codd_hf.__all__:
        assert getattr(codd_hf, name) is not None
    assert set(codd_hf.__all__) <= set(dir(codd_hf))
    with pytest.raises(AttributeError, match="no attribute 'CoDDTypo'"):
        _ = codd_hf.CoDDTypo
