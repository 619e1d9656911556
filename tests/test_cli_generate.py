"""Promises of `codd-hf generate --stream` and `codd-hf chat` in a terminal, and out of it."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import sys
from copy import deepcopy

import pytest
import torch

import launch
from codd_hf import CoDDPipeline
from codd_hf.checks.errors import printable
from codd_hf.cli import main
from codd_hf.cli.common import CLEAR, FIRST_SCREEN, SECOND_SCREEN, write_answer
from tiny_pipeline import save_tiny_pipeline

LENGTHS = {"gen_length": 16, "block_length": 8, "num_inference_steps": 6}
SHORT = [part for name, n in LENGTHS.items() for part in (f"--{name.replace('_', '-')}", str(n))]


class Screen(io.StringIO):
    """Standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def frames(self) -> tuple[list[str], str]:
        """What the second screen showed, and what is left on the first."""
        shown, _, left = self.getvalue().removeprefix(SECOND_SCREEN).rpartition(FIRST_SCREEN)
        return shown.split(CLEAR)[1:], left


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = CoDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


def test_backbone_is_given_its_mask_token_and_says_how_it_decodes(pipe, tmp_path, capsys):
    backbone, tokenizer = deepcopy(pipe.model.backbone), deepcopy(pipe.tokenizer)
    backbone.config.block_length = 4
    backbone.config.decoding = {"strategy": "threshold", "threshold": 0.8}
    mask, tokenizer.mask_token = tokenizer.mask_token_id, None
    for part in (backbone, tokenizer):
        part.save_pretrained(tmp_path)
    command = ["generate", "--model", str(tmp_path), "Tom", "--gen-length", "8", "--verbose"]
    assert main(command) == 1
    assert "`--mask-token-id`" in capsys.readouterr().err
    assert main([*command, "--mask-token-id", str(mask)]) == 0
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("Decoding (the published model: strategy threshold, threshold 0.8): tok")
    assert "tokens 8, block 4, strategy threshold," in told


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(pipe, prompts: list[str], seed: int = 0) -> list[str]:
    generators = [seeded(seed + i) for i in range(len(prompts))]
    return [printable(t) for t in pipe(prompts, **LENGTHS, generator=generators).texts]


def test_stream_out_of_a_terminal_prints_what_is_printed_without_it(folder, pipe, capsys):
    argv = ["generate", "How many?", "Where to?", "--model", str(folder), *SHORT]
    expected = "".join(f"{text}\n" for text in texts(pipe, ["How many?", "Where to?"]))
    for options in ([], ["--stream"]):
        assert main([*argv, *options]) == 0
        assert capsys.readouterr().out == expected


def test_dumb_terminal_gets_no_control_sequences(folder, screen, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    with contextlib.redirect_stdout(screen):
        assert main(["chat", "--model", str(folder), *SHORT]) == 0
    assert screen.getvalue().strip()
    assert "\x1b" not in screen.getvalue()


def test_stream_shows_every_step_and_leaves_the_text_alone(pipe, screen):
    with contextlib.redirect_stdout(screen):
        text = write_answer(pipe, prompt="How many?", **LENGTHS, generator=seeded(0))
    frames, left = screen.frames()
    masks = [frame.count("_") for frame in frames]
    assert len(frames) == 6
    assert masks == sorted(masks, reverse=True)
    assert masks[0] > masks[-1] == 0
    assert left == f"{printable(text)}\n"
    assert text == pipe("How many?", **LENGTHS, generator=seeded(0)).texts[0]


def test_stream_of_gaps_shows_the_text_around_them_and_no_control_sequences(pipe, screen):
    hostile = "\x1b[2J\x1b]0;title\x07Tom\x9b31m has\r\x08\u202e "
    prompt = f"{hostile}{3 * pipe.tokenizer.mask_token} eggs."
    call = {"infill": True, "paradigm": "full", "num_inference_steps": 3}
    with contextlib.redirect_stdout(screen):
        text = write_answer(pipe, prompt=prompt, generator=seeded(0), **call)
    frames, left = screen.frames()
    assert text.startswith(hostile)
    assert frames[0].count("_") == 2
    assert left == f"{printable(text)}\n"
    for frame in frames:
        assert frame.startswith(printable(hostile))
        assert frame.endswith(" eggs.")
        assert frame == printable(frame)


@pytest.mark.parametrize(
    "argv",
    [
        ["--input", "a.jsonl"],
        ["--output", "b.jsonl"],
        ["--input", "a.jsonl", "--output", "b.jsonl", "--stream"],
        ["How many?", "--input", "a.jsonl", "--output", "b.jsonl"],
    ],
)
def test_options_that_do_not_go_together_are_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["generate", *argv])
    assert leaving.value.code == 2
    assert "usage: codd-hf generate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "options", "given"),
    [
        (
            "Tom has 3 eggs.",
            ["--cache", "dual"],
            {"cache": "dual"},
        ),
        (
            "Tom has <|mask|><|mask|> eggs.",
            ["--infill", "--paradigm", "full", "--forbidden-token-ids", "40", "41"],
            {"infill": True, "paradigm": "full", "forbidden_token_ids": [40, 41]},
        ),
        ("Tom has", ["--no-chat-template"], {"use_chat_template": False}),
    ],
)
def test_options_reach_the_pipeline(folder, pipe, capsys, prompt, options, given):
    assert main(["generate", prompt, "--model", str(folder), *SHORT, *options]) == 0
    (expected,) = pipe(prompt, generator=seeded(0), **LENGTHS, **given).texts
    assert capsys.readouterr().out == f"{printable(expected)}\n"
    if "infill" not in given:
        assert expected != pipe(prompt, generator=seeded(0), **LENGTHS).texts[0]


def test_chat_remembers_what_was_said_until_it_is_cleared(folder, pipe, capsys, monkeypatch):
    lines = ["How many?", "", "And then?", "/clear", "And then?", "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(folder), "--seed", "5", *SHORT]) == 0
    printed = capsys.readouterr().out

    def answer(seed, *contents):
        pairs = zip(["user", "assistant", "user"], contents, strict=False)
        messages = [{"role": role, "content": content} for role, content in pairs]
        return pipe(messages=messages, **LENGTHS, generator=seeded(seed)).texts[0]

    first = answer(5, "How many?")
    second = answer(6, "How many?", first, "And then?")
    fresh = answer(7, "And then?")
    assert printed == "".join(f"{printable(text)}\n" for text in (first, second, fresh))


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "stopped (the message"), (ValueError("Too long."), "Too long. (the")],
)
def test_answer_that_is_stopped_or_fails_is_forgotten_and_the_chat_goes_on(
    folder, pipe, capsys, monkeypatch, error, said
):
    run, errors = CoDDPipeline.__call__, [error]

    def interrupted(*args, **kwargs):
        if errors:
            raise errors.pop()
        return run(*args, **kwargs)

    monkeypatch.setattr(CoDDPipeline, "__call__", interrupted)
    typed = io.StringIO("Never mind.\nHow many?\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", "--model", str(folder), *SHORT]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.endswith(f"> {texts(pipe, ['How many?'])[0]}\n> ")


def test_chat_that_cannot_go_on_fails_with_one_line(folder, pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("How many eggs are left?\n" * 12))
    assert main(["chat", "--model", str(folder), *SHORT]) == 1
    assert "exceed the 128 positions" in capsys.readouterr().err
    pipe.save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    assert main(["chat", "--model", str(tmp_path)]) == 1
    assert "has no chat template" in capsys.readouterr().err


def in_terminal(name: str, commands: list[list[str]]) -> None:
    """Some commands, in a process whose standard input and output are a terminal."""
    terminal = os.open(name, os.O_RDWR)
    for target in (0, 1):
        os.dup2(terminal, target)
    sys.stdin, sys.stdout = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w")))
    os.environ["TERM"] = "xterm"
    print([main(argv) for argv in commands], flush=True)


def test_stream_and_chat_draw_in_a_real_pseudo_terminal(folder, pipe):
    argv, typed = ["--model", str(folder), *SHORT], ["How many?\n", "/exit\n"]
    commands = [["generate", "How many?", "--stream", *argv], ["chat", *argv]]
    leader, follower = pty.openpty()
    (process,) = launch.start(in_terminal, os.ttyname(follower), commands)
    output = b""
    while select.select([leader], [], [], 0.2)[0] or process.is_alive():
        if select.select([leader], [], [], 0)[0]:
            output += os.read(leader, 65536)
        if typed and output.endswith(b"> "):
            os.write(leader, typed.pop(0).encode())
    os.close(leader)
    os.close(follower)
    assert process.exitcode == 0
    shown = output.decode().replace("\r\n", "\n")
    (text,) = texts(pipe, ["How many?"])
    assert shown.count(f"{FIRST_SCREEN}{text}\n") == 2
    assert shown.count(CLEAR) == 12
    assert shown.endswith("[0, 0]\n")
