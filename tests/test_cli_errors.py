"""What the command line makes of an exception: one line for a refusal, a traceback for a bug."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from codd_hf.checks.arguments import choice
from codd_hf.checks.errors import printable, reading
from codd_hf.cli import convert, main
from tiny_pipeline import save_tiny_pipeline, tiny_pipeline

HOSTILE = "a\x1b[31mb\x1b]0;title\x07\x9b2J\r\x08\x7f\u202ec\u2066d\u200fe\nf"


def raising(error: BaseException):
    def act():
        raise error

    return act


REFUSED = {
    "a check of a value": raising(ValueError("`x` must be 1, got 2.")),
    "a check of a type": raising(TypeError("`x` must be an int, got a str.")),
    "a missing library, said": raising(ImportError("`judge_file` needs gguf.")),
    "a loss that is no number": raising(FloatingPointError("The loss is nan.")),
    "a full disk": raising(OSError(errno.ENOSPC, "No space left on device")),
    "memory": raising(MemoryError("there is none left")),
    "memory of a GPU": raising(torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
    "memory of torch": lambda: torch.empty(10**15),
}
BUGS = {
    "an argument of a wrong type": lambda: None + 1,
    "a value that does not convert": lambda: int("x"),
    "a key": lambda: {}["x"],
    "an attribute": lambda: None.x,
    "an assertion": raising(AssertionError("x")),
    "torch's shapes": lambda: torch.ones(2) + torch.ones(3),
    "a module that is not there": lambda: __import__("no_such_module"),
}


def convert_fails(act, monkeypatch, capsys, *options: str) -> str:
    """What `codd-hf convert` writes to standard error when this happens in it."""
    monkeypatch.setattr(convert, "run", lambda args: act())
    assert main(["convert", "a", "b", *options]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_is_one_line_and_code_1(kind, monkeypatch, capsys):
    error = convert_fails(REFUSED[kind], monkeypatch, capsys)
    assert error.startswith("codd-hf convert: error: ")
    assert error.count("\n") == 1
    assert len(error) > len("codd-hf convert: error: \n") + 5


@pytest.mark.parametrize("kind", BUGS)
def test_bug_stays_a_traceback_with_a_line_that_asks_for_a_report(kind, monkeypatch, capsys):
    error = convert_fails(BUGS[kind], monkeypatch, capsys)
    assert "Traceback (most recent call last)" in error
    last = error.splitlines()[-1]
    assert last.startswith("codd-hf convert: this is a bug in codd-hf: please report it")


def test_debug_shows_the_traceback_of_a_refusal_before_its_line(capsys):
    assert main(["convert", "--debug", "./no.jpc", "b"]) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("codd-hf convert: error: ")


@pytest.mark.parametrize("error", [ValueError(HOSTILE), KeyError(HOSTILE)])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_error_text_controls_the_terminal(error, debug, monkeypatch, capsys):
    assert is_harmless(convert_fails(raising(error), monkeypatch, capsys, *debug))


def is_harmless(text: str) -> bool:
    controls = any(ord(c) < 32 and c != "\n" for c in text)
    return not controls and not set("\x7f\x9b\u202e\u2066\u200f") & set(text)


def test_printed_text_is_harmless_and_whole():
    assert is_harmless(printable("red \x1b[31mtext\x1b]0;title\x07 \x9b2J back\x08 \r over\x7f"))
    text = "Zoë:\t3 €\n7 🥚 \u200d 👩\u200d🚀 שלום"
    assert printable(text) == text


def test_interrupt_is_code_130_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(convert, "run", lambda args: raising(KeyboardInterrupt())())
    assert main(["convert", "a", "b"]) == 130
    assert capsys.readouterr().err == "codd-hf convert: stopped\n"


def command(code: str, **options) -> subprocess.CompletedProcess:
    """`codd-hf convert` in a process of its own, with `code` as what the command does."""
    program = (
        "import sys\nfrom codd_hf.cli import convert, main\n"
        f"def run(args):\n    {code}\nconvert.run = run\nsys.exit(main(['convert', 'a', 'b']))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=60, **options
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_standard_output_on_a_full_disk_is_a_failure():
    with open("/dev/full", "w") as full:
        result = command("print('text')", stdout=full)
    assert result.returncode == 1
    assert result.stderr.startswith("codd-hf convert: error: ")
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


def test_reader_that_leaves_ends_the_command_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    result = command("print('text' * 10**6)", stdout=writer)
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == ""


def test_text_that_the_terminal_cannot_encode_is_printed_as_an_escape():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = command(r"print('\u20ac')", stdout=subprocess.PIPE, env=environment)
    assert (result.returncode, result.stdout) == (0, "\\u20ac\n")


def test_door_makes_one_sentence_of_what_a_library_raises_and_of_nothing_else():
    deep = lambda: json.loads("[" * 10**6)  # noqa: E731
    for act in (lambda: json.loads("{"), deep, raising(SafetensorError())):
        with pytest.raises(OSError, match=r"^'x.json' cannot be read: .*\.$"), reading("'x.json'"):
            act()
    with pytest.raises(KeyboardInterrupt), reading("'x.json'"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="`coupling` must be"), reading("'x.json'"):
        choice("coupling", "x", ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "x", "--seed", "1" * 30],
        ["chat", "--seed", "-1"],
        ["demo", "--num-tasks", "0"],
        ["evaluate", "gap", "--num-problems", "0"],
        ["evaluate", "gap", "--evidence-size", "-1"],
        ["evaluate", "quality", "--judge", "x", "--batch-size", "-3"],
        ["generate", "--batch-size", "0"],
        ["bench", "all", "--seed", "1.5"],
        ["bench", "head-step", "--repeats", "0"],
        ["bench", "overhead", "--vocabularies", "0"],
        ["bench", "overhead", "--device", "abacus"],
    ],
)
def test_value_that_cannot_be_is_bad_usage_that_names_it(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    last, option = capsys.readouterr().err.splitlines()[-1], argv[-2]
    assert option in last or f"`{option[2:].replace('-', '_')}`" in last


def refusal(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "bug" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize("command", [["generate"], ["chat"]])
def test_standard_input_that_is_no_text_is_one_line(command, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8"))
    assert "Standard input cannot be read" in refusal(capsys, *command, "--model", str(folder))


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "data.jsonl"), (b'{"answer": "b"}\n{', "data.jsonl"), (b'{"answer": 3}\n', "answer")],
)
def test_data_that_cannot_be_read_are_one_line(content, named, folder, capsys, tmp_path):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    for command in (
        ["train", "--dataset", str(path), "--output", str(tmp_path / "run")],
        ["evaluate", "gap", "--model", str(folder), "--dataset", str(path)],
    ):
        assert named in refusal(capsys, *command)


def test_model_that_cannot_be_had_is_one_line_that_names_it(folder, capsys, tmp_path):
    assert "not/there" in refusal(capsys, "generate", "hello", "--model", "./not/there")
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = refusal(capsys, "generate", "hello", "--model", str(copy))
    assert "copy/model/model.safetensors' is damaged" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-inference-steps", "1"), ("--strategy", "luck"), ("--gen-length", "0")],
)
def test_choice_that_cannot_be_is_one_line_that_names_it(folder, capsys, option, value):
    argv = ["generate", "Where to?", "--model", str(folder), "--gen-length", "64", option, value]
    line = refusal(capsys, *argv)
    assert f"`{option[2:].replace('-', '_')}`" in line


def test_empty_prompt_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "`prompt` is empty" in refusal(capsys, "generate")


@pytest.mark.parametrize(
    "command", [["bench", "overhead", "--quick"], ["evaluate", "gap"], ["evaluate", "quality"]]
)
def test_output_that_cannot_be_written_is_found_before_the_work(command, tmp_path, capsys):
    judge = ["--judge", "x"] if command[-1] == "quality" else []
    for output in (tmp_path, tmp_path / "nowhere" / "x.json"):
        line = refusal(capsys, *command, *judge, "--output", str(output))
        assert f"`--output` '{output}' cannot be written" in line


def test_judge_that_cannot_be_had_is_one_line(folder, tmp_path, capsys):
    rows = "".join('{"question": "How many?", "answer": "He has 7 eggs."}\n' for _ in range(2))
    (tmp_path / "rows.jsonl").write_text(rows)
    command = ["evaluate", "quality", "--model", str(folder)]
    command += ["--dataset", str(tmp_path / "rows.jsonl"), "--judge"]
    judge = tmp_path / "judge"
    shutil.copytree(folder / "tokenizer", judge)
    shutil.copy(folder / "model" / "config.json", judge)
    (judge / "tokenizer.json").write_text("{")
    assert "judge/tokenizer.json' is damaged" in refusal(capsys, *command, str(judge))
    assert "nobody/nothing" in refusal(capsys, *command, "nobody/nothing")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "conditional.mixed_precision=int8"], "`mixed_precision` must be"),
        (["--set", "emission=x"], "`emission` must be one of"),
        (["--conditioning", "x"], "`conditioning` must"),
        (["--window-length", "1"], "`window_length` must be"),
        (["--dataset", ""], "`source` '' cannot be read"),
    ],
)
def test_setting_of_training_that_cannot_be_is_found_before_anything_is_done(
    options, said, tmp_path, capsys
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"answer": "He has 7 eggs."}\n' * 200)
    argv = ["train", "--dataset", str(rows), "--output", str(tmp_path / "run"), *options]
    with contextlib.suppress(SystemExit):  # those that one option alone shows are bad usage
        assert main(argv) == 1
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_model_without_a_tokenizer_is_one_line(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "How many?", "answer": "He has 7 eggs."}\n' * 2)
    model, output = ["--model", str(tmp_path / "model")], str(tmp_path / "out.jsonl")
    for command in (
        ["generate", "How many?"],
        ["generate", "--input", str(rows), "--output", output],
        ["evaluate", "gap", "--dataset", str(rows)],
        ["evaluate", "quality", "--judge", "x", "--dataset", str(rows)],
    ):
        assert "tokenizer" in refusal(capsys, *command, *model)


def test_hub_that_cannot_be_reached_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise HTTPError("Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", unreachable)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"answer": "He has 7 eggs."}\n' * 20)
    command = ["train", "--dataset", str(rows), "--backbone", str(folder), "--push-to-hub"]
    command += ["--output", str(tmp_path / "run"), "--num-validation", "3"]
    said = "The Hub cannot be reached (Connection refused): check the connection."
    assert said in refusal(capsys, *command)
    with pytest.raises(OSError, match="The Hub cannot be reached"):
        tiny_pipeline().push_to_hub("mine")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no \x1b[31m\u202eplease') }}",
        "{{ messages[5]['content'] + 1 }}",
        "{% for x in y",
        "{{ none }}",
    ],
)
def test_chat_template_that_fails_is_one_line(template, folder, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer" / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "How many?"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    model = ["--model", str(copy), "--gen-length", "4", "--block-length", "4"]
    model += ["--num-inference-steps", "1"]
    files = ["--input", str(rows), "--output", str(tmp_path / "out.jsonl")]
    for command in (["generate", "How many?"], ["chat"], ["generate", *files]):
        if template == "{{ none }}":  # a text like any other
            assert main([*command, *model]) == 0
            continue
        line = refusal(capsys, *command, *model)
        assert "chat template" in line
        assert not any(ord(c) < 32 for c in line)
        assert "\u202e" not in line
        if files[0] in command:
            assert line.startswith("codd-hf generate: error: Line 1 of ")
