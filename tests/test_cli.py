"""Promises of the command line: worked examples, exit codes, and what each command prints."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest

import codd_hf
from codd_hf.cli import COMMANDS, main

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


def test_demo_prints_both_texts_and_the_number_of_passes(trained_pipeline, capsys):
    argv = ["demo", "--model", str(trained_pipeline), "--gen-length", "32"]
    assert main([*argv, "--num-inference-steps", "2", "--num-questions", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("Where to?") == 2
    assert "factorized 2 passes" in text
    assert "CoDD 2 passes" in text


def test_evaluate_gap_prints_the_table_and_reads_as_many_tokens_as_asked(
    trained_pipeline, tmp_path, capsys
):
    path = tmp_path / "gap.json"
    argv = ["evaluate", "gap", "--model", str(trained_pipeline), "--num-problems", "4"]
    argv += ["--output", str(path)]
    heads = [x for name in ("one", "two") for x in ("--head", f"{name}={trained_pipeline}/stage1")]
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


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "data.jsonl"), ('{"answer": "x"\n{{{\n', "data.jsonl"), ('{"answer": 3}\n', "answer")],
)
def test_data_that_cannot_be_read_is_one_line(capsys, tmp_path, trained_pipeline, content, named):
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
    data = ["--dataset", str(tmp_path / "data.jsonl")]
    assert named in failure(capsys, "train", *data, "--output", str(tmp_path))
    model = ["--model", str(trained_pipeline)]
    assert named in failure(capsys, "evaluate", "gap", *model, *data)


def test_model_that_cannot_be_had_is_one_line_that_names_it(capsys, tmp_path, trained_pipeline):
    line = failure(capsys, "generate", "hello", "--model", "./not/there")
    assert line.startswith("codd-hf generate: error: ")
    assert "not/there" in line
    assert "demo.jsonl" in failure(capsys, "demo", "--model", str(tmp_path))
    shutil.copytree(trained_pipeline, tmp_path / "copy")
    weights = tmp_path / "copy" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = failure(capsys, "generate", "hello", "--model", str(tmp_path / "copy"), *SHORT)
    assert "copy/model/model.safetensors' is damaged" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num-inference-steps", "0"),
        ("--num-inference-steps", "1"),
        ("--strategy", "luck"),
        ("--gen-length", "0"),
    ],
)
def test_setting_that_cannot_be_is_one_line_that_names_it(capsys, trained_pipeline, option, value):
    argv = ["generate", "Where to?", "--model", str(trained_pipeline), *SHORT, option, value]
    assert f"`{option[2:].replace('-', '_')}`" in failure(capsys, *argv)


def test_empty_prompt_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "`prompt` is empty" in failure(capsys, "generate")


def test_importing_the_package_is_cheap_and_every_public_name_is_there():
    code = "import sys, codd_hf; print({'torch', 'transformers', 'diffusers'} & {*sys.modules})"
    assert python(code) == "set()"
    for name in codd_hf.__all__:
        assert getattr(codd_hf, name) is not None
    assert set(codd_hf.__all__) <= set(dir(codd_hf))
    with pytest.raises(AttributeError, match="no attribute 'CoDDTypo'"):
        _ = codd_hf.CoDDTypo
