"""Promises of the command line: worked examples, exit codes, one line for an error, safe text."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest

import codd_hf
from codd_hf.cli import COMMANDS, main
from codd_hf.cli.common import printable

SHORT = ["--gen-length", "8", "--block-length", "4", "--num-inference-steps", "2"]


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def failure(capsys, *argv: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main(argv) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("codd-hf")]
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  codd-hf {command}" in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "generate", "train", "evaluate"))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["generate", "hello", "--gen-length", "many"],
        ["generate", "hello", "--unknown"],
        ["train", "--output", "x"],
        ["evaluate"],
        ["evaluate", "speed"],
    ],
)
def test_bad_usage_leaves_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    assert "usage: codd-hf" in capsys.readouterr().err


def test_generate_prints_the_text_of_every_prompt_and_depends_on_the_seed_alone(
    trained_pipeline, capsys
):
    argv = ["generate", "Where to?", "Where to?", "--model", str(trained_pipeline), *SHORT]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*argv, "--seed", seed, "--temperature", "1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].rstrip("\n").split("\n")) >= 2


def test_generate_reads_prompts_from_standard_input(trained_pipeline, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where to?\n\n"))
    assert main(["generate", "--model", str(trained_pipeline), *SHORT]) == 0
    assert capsys.readouterr().out.strip()


def test_demo_prints_both_texts_and_the_number_of_passes(trained_pipeline, capsys):
    argv = ["demo", "--model", str(trained_pipeline), "--gen-length", "32"]
    assert main([*argv, "--num-inference-steps", "2", "--num-questions", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("Where to?") == 2
    assert "factorized" in text
    assert "CoDD" in text
    assert "factorized 2 passes" in text
    assert "CoDD 2 passes" in text


def test_evaluate_gap_prints_the_table_and_writes_the_figures(trained_pipeline, capsys, tmp_path):
    path = tmp_path / "gap.json"
    argv = ["evaluate", "gap", "--model", str(trained_pipeline), "--ratios", "0.5", "1"]
    assert main([*argv, "--num-problems", "4", "--output", str(path)]) == 0
    text = capsys.readouterr().out
    header = text.splitlines()[0]
    for name in ("factorized", "raw product", "corrected", "fitted", "sequential", "gap closed"):
        assert name in header
    result = json.loads(path.read_text())
    assert [row["ratio"] for row in result["rows"]] == [0.5, 1.0]
    assert result["environment"]["examples"] == 4
    assert "torch" in result["environment"]


def test_evaluate_gap_reads_as_many_likeliest_tokens_as_asked(trained_pipeline, tmp_path, capsys):
    nats = {}
    argv = ["evaluate", "gap", "--model", str(trained_pipeline), "--ratios", "1"]
    argv += ["--num-problems", "4", "--no-sequential"]
    for k in (0, 1, 10**6):
        path = tmp_path / f"{k}.json"
        assert main([*argv, "--evidence-size", str(k), "--output", str(path)]) == 0
        (row,) = json.loads(path.read_text())["rows"]
        nats[k] = row["nats"]["fitted"]
    assert nats[1] != nats[0]
    assert nats[10**6] == pytest.approx(nats[0], abs=1e-4)


def test_train_writes_a_model_that_generate_takes(trained_pipeline, cities_jsonl, capsys, tmp_path):
    argv = ["train", "--dataset", str(cities_jsonl), "--output", str(tmp_path)]
    argv += ["--backbone", str(trained_pipeline.parent / "backbone"), "--num-latents", "6"]
    argv += ["--num-validation", "8", "--window-length", "4", "--generative-num-epochs", "1"]
    argv += ["--conditional-max-steps", "2", "--set", "conditional.tokens_per_batch=256"]
    assert main(argv) == 0
    folder = str(tmp_path / "pipeline")
    assert f"codd-hf generate --model {folder}" in capsys.readouterr().out
    assert main(["generate", "Where to?", "--model", folder, *SHORT]) == 0


def test_missing_model_is_one_line_that_names_it(capsys):
    line = failure(capsys, "generate", "hello", "--model", "./not/there")
    assert line.startswith("codd-hf generate: error: ")
    assert "not/there" in line


def test_missing_dataset_is_one_line_that_names_it(capsys, tmp_path, trained_pipeline):
    line = failure(capsys, "train", "--dataset", "none.jsonl", "--output", str(tmp_path))
    assert "none.jsonl" in line
    model = ["--model", str(trained_pipeline)]
    assert "none.jsonl" in failure(capsys, "evaluate", "gap", *model, "--dataset", "none.jsonl")


def test_model_without_held_out_questions_is_one_line_that_says_so(capsys, tmp_path):
    assert "demo.jsonl" in failure(capsys, "demo", "--model", str(tmp_path))


def test_malformed_dataset_is_one_line(capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"answer": "x"\n{{{\n')
    source = str(tmp_path / "bad.jsonl")
    assert "bad.jsonl" in failure(capsys, "train", "--dataset", source, "--output", str(tmp_path))


def test_column_that_is_no_text_is_one_line_that_names_it(capsys, tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"answer": 3}\n')
    source = str(tmp_path / "numbers.jsonl")
    assert "answer" in failure(capsys, "train", "--dataset", source, "--output", str(tmp_path))


def test_damaged_weights_are_one_line(capsys, tmp_path, trained_pipeline):
    shutil.copytree(trained_pipeline, tmp_path / "copy")
    weights = tmp_path / "copy" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = failure(capsys, "generate", "hello", "--model", str(tmp_path / "copy"), *SHORT)
    assert "copy/model/model.safetensors' is damaged" in line


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--num-inference-steps", "0", "num_inference_steps"),
        ("--num-inference-steps", "1", "num_inference_steps"),
        ("--strategy", "luck", "strategy"),
        ("--gen-length", "0", "gen_length"),
    ],
)
def test_setting_that_cannot_be_is_one_line_that_names_it(
    capsys, trained_pipeline, option, value, named
):
    argv = ["generate", "Where to?", "--model", str(trained_pipeline), *SHORT, option, value]
    assert named in failure(capsys, *argv)


def test_empty_prompt_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "`prompt` is empty" in failure(capsys, "generate")


def test_printed_text_holds_no_terminal_control_sequences():
    text = "red \x1b[31mtext\x1b]0;title\x07 \x9b2J back\x08 \r over\x7f \u202egnirts\u202c"
    shown = printable(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert "\u202e" not in shown
    assert printable("Zoë:\t3 €\n7 🥚") == "Zoë:\t3 €\n7 🥚"


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, codd_hf\n"
        "print(sorted({'torch', 'transformers', 'diffusers'} & {*sys.modules}))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom codd_hf.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    assert python(code).stdout.splitlines()[-1] == "False"


def test_every_public_name_can_be_imported():
    for name in codd_hf.__all__:
        assert getattr(codd_hf, name) is not None
    assert set(codd_hf.__all__) <= set(dir(codd_hf))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'CoDDTypo'"):
        _ = codd_hf.CoDDTypo
