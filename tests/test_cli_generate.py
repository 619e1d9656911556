"""Promises of `codd-hf generate --stream` and `codd-hf chat` in a terminal, and out of it."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys

import pytest
import torch

from codd_hf import CoDDPipeline
from codd_hf.cli import main
from codd_hf.cli.common import printable
from codd_hf.cli.terminal import COLOURS, CanvasView, token_texts, wrapped
from terminal_emulator import Terminal
from tiny_pipeline import save_tiny_pipeline

LENGTHS = {"gen_length": 16, "block_length": 8, "num_inference_steps": 6}
SHORT = [part for name, n in LENGTHS.items() for part in (f"--{name.replace('_', '-')}", str(n))]
OWN = re.compile(r"\x1b\[(\d+A|J|K|0m|2m|38;5;\d+m)|[\r\n]")


class Screen(io.StringIO):
    """Standard output that says it is a terminal, and draws on one what each write leaves."""

    def __init__(self, columns: int = 80, rows: int = 24):
        super().__init__()
        self.terminal = Terminal(columns, rows)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.terminal.feed(text)
        return super().write(text)


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
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Screen()


def run_on(screen: Screen, *argv: str) -> None:
    with contextlib.redirect_stdout(screen):
        assert main(argv) == 0


def resized(monkeypatch, screen: Screen, columns: int, rows: int) -> None:
    screen.terminal = Terminal(columns, rows)
    size = os.terminal_size((columns, rows))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: size)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(pipe, prompts: list[str], seed: int = 0) -> list[str]:
    generators = [seeded(seed + i) for i in range(len(prompts))]
    return [printable(t) for t in pipe(prompts, **LENGTHS, generator=generators).texts]


def test_stream_out_of_a_terminal_prints_what_is_printed_without_it(folder, pipe, capsys):
    argv = ["generate", "How many?", "Where to?", "--model", str(folder), *SHORT]
    assert main([*argv, "--stream"]) == 0
    streamed = capsys.readouterr().out
    assert main(argv) == 0
    assert streamed == capsys.readouterr().out
    assert streamed == "".join(f"{text}\n" for text in texts(pipe, ["How many?", "Where to?"]))
    assert "\x1b" not in streamed


@pytest.mark.parametrize(
    ("name", "value", "command"),
    [("NO_COLOR", "1", ["generate", "--stream"]), ("TERM", "dumb", ["chat"])],
)
def test_no_control_sequences_where_the_user_wants_none(
    folder, screen, monkeypatch, name, value, command
):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    run_on(screen, *command, "--model", str(folder), *SHORT)
    assert screen.getvalue().strip()
    assert "\x1b" not in screen.getvalue()


@pytest.mark.parametrize(("columns", "rows"), [(12, 24), (6, 3)])
def test_stream_in_a_terminal_of_any_size_ends_with_the_texts_alone(
    folder, pipe, screen, monkeypatch, columns, rows
):
    resized(monkeypatch, screen, columns, rows)
    prompts = ["How many?", "Where to?"]
    run_on(screen, "generate", *prompts, "--model", str(folder), *SHORT, "--stream")
    plain = Terminal(columns, rows)
    plain.feed("".join(f"{text}\n" for text in texts(pipe, prompts)))
    assert screen.terminal.text == plain.text


def test_stream_shows_the_canvas_of_every_step_and_only_that(pipe, screen, monkeypatch):
    resized(monkeypatch, screen, 9, 24)
    canvases = []

    view = CanvasView(pipe, screen)

    def remember(pipe, step, timestep, kwargs):
        view.on_step_end(pipe, step, timestep, kwargs)
        canvases.append(kwargs["canvas"][0][kwargs["generated"][0]].tolist())
        return {}

    pipe(
        "How many?",
        **LENGTHS,
        generator=seeded(0),
        callback_on_step_end=remember,
        callback_on_step_end_tensor_inputs=["canvas", "generated", "transfer_index"],
    )
    mask = pipe.model.config.mask_token_id
    shown = [frame.count("_") for frame in screen.terminal.frames]
    assert shown == [canvas.count(mask) for canvas in canvases]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > shown[2] > shown[-1] == 0
    texts = [token_texts(pipe.tokenizer, canvas, mask) for canvas in canvases]
    for frame, parts in zip(screen.terminal.frames, texts, strict=True):
        expected = wrapped([("", printable(part)) for part in parts], 8)
        lines = [line.replace("\x1b[0m", "").rstrip() for line in expected]
        assert len(lines) > 1
        assert frame == "\n".join(lines)


def test_tokens_have_the_colour_of_the_step_that_committed_them(pipe, screen):
    steps = {}
    view = CanvasView(pipe, screen)

    def remember(pipe, step, timestep, kwargs):
        start = int(kwargs["generated"][0].long().argmax())
        for position in kwargs["transfer_index"][0].nonzero()[:, 0].tolist():
            steps[position - start] = step
        return view.on_step_end(pipe, step, timestep, kwargs)

    output = pipe(
        "How many?",
        **LENGTHS,
        generator=seeded(1),
        callback_on_step_end=remember,
        callback_on_step_end_tensor_inputs=["canvas", "generated", "transfer_index"],
    )
    tokens = output.sequences[0].tolist()
    mask = pipe.model.config.mask_token_id
    expected = []
    for position, part in enumerate(token_texts(pipe.tokenizer, tokens, mask)):
        colour = COLOURS[steps[position] * (len(COLOURS) - 1) // 5]
        expected += [(c, f"38;5;{colour}") for c in printable(part) if c != "\n"]
    assert [cell for cell in screen.terminal.cells if cell != (" ", "")] == expected
    assert len({style for _, style in expected}) == 6
    assert {steps[i] for i in range(16)} == set(range(6))


def test_text_of_a_model_writes_no_control_sequences_into_the_terminal(pipe, screen):
    hostile = "\x1b[2J\x1b]0;title\x07red\x9b31m\r\x08\u202e"
    tokens = pipe.tokenizer(hostile, add_special_tokens=False)["input_ids"]
    canvas = torch.tensor([tokens])
    view = CanvasView(pipe, screen)
    state = {"canvas": canvas, "generated": canvas > -1, "transfer_index": canvas > -1}
    view.on_step_end(pipe, 0, 1.0, state)
    view.finish(tokens, hostile)
    assert OWN.sub("", screen.getvalue()) == printable(hostile) * 2 == "[2J]0;titlered31m" * 2


def test_texts_of_tokens_are_the_text_cut_into_pieces(pipe):
    text = "Zoë has 12 🥚 eggs.\n 漢字 and 7 apples \u200d left"
    tokens = pipe.tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = pipe.model.config.mask_token_id
    parts = token_texts(pipe.tokenizer, tokens, mask)
    assert len(parts) == len(tokens) > len(text) / 3
    assert "".join(parts) == text
    hidden = [*tokens[:3], mask, pipe.tokenizer.eos_token_id, *tokens[4:], 10**6]
    assert "".join(token_texts(pipe.tokenizer, hidden, mask)).count("_") == 1


def test_lines_are_never_wider_than_the_terminal():
    lines = wrapped([("<", "漢字ab\tc"), (">", "e\u0301e\n\nx")], 5)
    assert [re.sub("[<>]|\x1b\\[0m", "", line) for line in lines] == [
        "漢字a", "b    ", "ce\u0301e", "", "x"
    ]  # fmt: skip


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
            ["--cache", "dual", "--guidance-scale", "2"],
            {"cache": "dual", "guidance_scale": 2.0},
        ),
        (
            "Tom has <|mask|><|mask|> eggs.",
            ["--infill", "--paradigm", "full", "--forbidden-token-ids", "40", "41"],
            {"infill": True, "paradigm": "full", "forbidden_token_ids": [40, 41]},
        ),
    ],
)
def test_options_reach_the_pipeline(folder, pipe, capsys, prompt, options, given):
    assert main(["generate", prompt, "--model", str(folder), *SHORT, *options]) == 0
    (expected,) = pipe(prompt, generator=seeded(0), **LENGTHS, **given).texts
    assert capsys.readouterr().out == f"{printable(expected)}\n"
    if "infill" in given:
        assert expected.startswith("Tom has ")
        assert expected.endswith(" eggs.")
    else:
        assert expected != pipe(prompt, generator=seeded(0), **LENGTHS).texts[0]


def test_stream_of_gaps_shows_the_text_around_them(folder, pipe, screen, monkeypatch):
    resized(monkeypatch, screen, 60, 24)
    template = f"Tom has {3 * pipe.tokenizer.mask_token} eggs."
    drawn = []
    monkeypatch.setattr(CanvasView, "write", keeping(drawn, CanvasView.write))
    argv = ["generate", template, "--infill", "--stream", "--model", str(folder)]
    run_on(screen, *argv, *SHORT, "--paradigm", "full", "--num-inference-steps", "3")
    lengths = LENGTHS | {"num_inference_steps": 3, "paradigm": "full"}
    text = pipe(template, **lengths, infill=True, generator=seeded(0)).texts[0]
    assert screen.terminal.text.rstrip() == printable(text).rstrip()
    frames = [OWN.sub("", frame) for frame in drawn]
    assert len(frames) > 2
    assert all(frame.startswith("Tom has ") and frame.endswith(" eggs.") for frame in frames)
    assert frames[0].count("_") == 2


def keeping(drawn, write):
    def kept(view, text):
        drawn.append(text)
        write(view, text)

    return kept


def test_chat_remembers_what_was_said_until_it_is_cleared(folder, pipe, capsys, monkeypatch):
    lines = ["How many?", "", "And then?", "/clear", "And then?", "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    argv = ["chat", "--model", str(folder), "--system", "Count.", "--seed", "5", *SHORT]
    assert main(argv) == 0
    printed = capsys.readouterr().out

    def answer(seed, *contents):
        roles = ["system", "user", "assistant", "user"]
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=False)
        ]
        return pipe(messages=messages, **LENGTHS, generator=seeded(seed)).texts[0]

    first = answer(5, "Count.", "How many?")
    second = answer(6, "Count.", "How many?", first, "And then?")
    fresh = answer(8, "Count.", "And then?")
    assert printed == "".join(f"{printable(text)}\n" for text in (first, second, fresh))


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "(stopped: the message"), (ValueError("Too long."), "Too long. (the")],
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
    assert main(["chat", "--model", str(folder), "--seed", "-1", *SHORT]) == 0
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


def in_pseudo_terminal(commands: list[list[str]], typed: list[str]) -> tuple[str, int]:
    """What commands, run by one process, write to a real pseudo-terminal, and the exit code.

    A line is typed at each `> `; the terminal tells no size.
    """
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    code = f"from codd_hf.cli import main; print([main(argv) for argv in {commands!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(follower)
    output, typed = b"", list(typed)
    while select.select([leader], [], [], 90)[0]:
        try:
            output += os.read(leader, 65536)
        except OSError:
            break
        if typed and output.endswith(b"> "):
            os.write(leader, typed.pop(0).encode())
    os.close(leader)
    return output.decode().replace("\r\n", "\n"), process.wait()


def test_stream_and_chat_draw_in_a_real_pseudo_terminal(folder, pipe):
    argv = ["--model", str(folder), *SHORT]
    commands = [["generate", "How many?", "--stream", *argv], ["chat", *argv]]
    output, code = in_pseudo_terminal(commands, ["How many?\n", "/exit\n"])
    assert code == 0
    text = texts(pipe, ["How many?"])[0]
    plain, terminal = Terminal(), Terminal()
    plain.feed(f"{text}\n> How many?\n{text}\n> /exit\n[0, 0]\n")
    terminal.feed(output)
    assert terminal.text == plain.text
    streamed, chatted = output.split("> ", maxsplit=1)
    for part in (streamed, chatted):
        assert part.count("\x1b[2m_") > 10
        assert len(set(re.findall(r"\x1b\[38;5;\d+m", part))) == 6
