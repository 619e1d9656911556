"""Promises of `codd-hf generate --input`: every line once and in order, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import launch
from codd_hf import CoDDPipeline
from codd_hf.checks.settings import settings_of
from codd_hf.cli import jsonl, main
from codd_hf.cli.generate import GenerateSettings
from codd_hf.cli.jsonl import RunFiles
from codd_hf.data.sources import RowReport, read_rows
from codd_hf.runtime.files import append_results
from tiny_pipeline import save_tiny_pipeline

LENGTHS = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4}
OPTIONS = [part for name, n in LENGTHS.items() for part in (f"--{name.replace('_', '-')}", str(n))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = CoDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_questions(path: Path, number: int) -> Path:
    lines = [
        json.dumps({"id": i, "question": f"How many eggs? {'Tom has 3. ' * (i % 3)}", "n": [i]})
        for i in range(number)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def source(tmp_path):
    return write_questions(tmp_path / "questions.jsonl", 7)


def expected(pipe, source: Path, seed: int = 0) -> bytes:
    """The answers one by one, written by hand."""
    lines = []
    for row, line in enumerate(source.read_text().splitlines()):
        generator = torch.Generator().manual_seed(seed + row)
        text = pipe(json.loads(line)["question"], **LENGTHS, generator=generator).texts[0]
        lines.append(f'{line[:-1]}, "generated_text": {json.dumps(text, ensure_ascii=False)}}}\n')
    return "".join(lines).encode()


def process(index: int, count: int) -> SimpleNamespace:
    """A process of several, in a test that runs them one after the other."""
    return SimpleNamespace(
        process_index=index,
        num_processes=count,
        is_main_process=index == 0,
        wait_for_everyone=lambda: None,
    )


def answered(pipe, source, output, state=None, **options) -> tuple[int, RowReport]:
    names = settings_of(GenerateSettings).keys() & options.keys() - {"infill"}
    settings = {name: options.pop(name) for name in names}
    files = GenerateSettings(input=str(source), output=str(output), **settings)
    return jsonl.answer_jsonl(pipe, files, options, state or process(0, 1))


def answer_jsonl(*args, **options) -> int:
    return answered(*args, **options)[0]


class Killed(Exception):
    pass


class Stopping:
    """A pipeline that is stopped after so many batches."""

    def __init__(self, pipe, batches: int):
        self.pipe, self.left = pipe, batches

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return self.pipe(*args, **kwargs)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_rows_get_the_answer_they_get_alone_and_keep_their_order(
    pipe, source, tmp_path, batch_size
):
    output = tmp_path / "answers.jsonl"
    number = answer_jsonl(pipe, source, output, batch_size=batch_size, seed=4, **LENGTHS)
    assert number == 7
    assert output.read_bytes() == expected(pipe, source, seed=4)
    texts = [json.loads(line)["generated_text"] for line in output.read_text().splitlines()]
    assert len(set(texts)) == 7
    assert not (tmp_path / "answers.jsonl.parts").exists()


def test_other_columns_stay_and_a_byte_order_mark_goes(pipe, tmp_path):
    source, output = tmp_path / "odd.jsonl", tmp_path / "answers.jsonl"
    lines = [
        b'{"p": "How many?", "x": 1.10, "y": 12345678901234567890123, "s": "\\ud800\\u00e9"} ',
        b"",
        b'\t{"x": {"y": [1, null]}, "p": "Wo? \xc3\xa9" }\r',
        b'{"p":"Last","p2":Infinity}',
    ]
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    options = {"prompt_column": "p", "output_column": "a b", **LENGTHS}
    assert answer_jsonl(pipe, source, output, **options) == 3
    for written, line in zip(output.read_bytes().splitlines(), (0, 2, 3), strict=True):
        row = json.loads(written)
        assert isinstance(row.pop("a b"), str)
        assert row == json.loads(lines[line])
    assert b"Wo? \xc3\xa9" in output.read_bytes()


def test_line_may_have_lengths_steps_and_a_seed_of_its_own(pipe, tmp_path):
    source, output = tmp_path / "own.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"prompt": "How many?"},
        {"prompt": "How many?", "gen_length": 12, "num_inference_steps": 3},
        {"prompt": "How many?", "seed": 4},
        {"prompt": "How many?", "seed": 4, "gen_length": 3, "num_inference_steps": 1},
    ]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert answer_jsonl(pipe, source, output, seed=2, **LENGTHS) == 4
    usual = [2, 3, 4, 5]
    for line, answered, seed in zip(lines, output.read_text().splitlines(), usual, strict=True):
        own = {name: line[name] for name in LENGTHS if name in line}
        generator = torch.Generator().manual_seed(line.get("seed", seed))
        expected = pipe(line["prompt"], generator=generator, **(LENGTHS | own)).texts[0]
        assert json.loads(answered) == line | {"generated_text": expected}


def test_stopped_run_goes_on_with_any_batch_size_and_does_torn_lines_again(pipe, source, tmp_path):
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        answer_jsonl(Stopping(pipe, 3), source, output, batch_size=1, **LENGTHS)
    assert not output.exists()
    [part] = (tmp_path / "answers.jsonl.parts").iterdir()
    whole, files = part.read_bytes(), RunFiles(output, {})
    ends = [i for i, byte in enumerate(whole + b"\n") if byte == ord("\n") and i]
    for cut in range(len(whole) + 1):
        part.write_bytes(whole[:cut])
        done = list(range(sum(end <= cut for end in ends)))
        assert list(files.answers()) == done
        if cut % 20 == 0:
            append_results(part, [(9, "text")])  # is whole, whatever stands before it
            assert list(files.answers()) == [*done, 9]
    for cut, left in ((ends[1] + 9, 5), (ends[1], 5), (ends[1] - 1, 6)):
        part.parent.mkdir(exist_ok=True)
        output.unlink(missing_ok=True)
        part.write_bytes(whole[:cut])
        assert answer_jsonl(pipe, source, output, batch_size=2, **LENGTHS) == left
        assert output.read_bytes() == expected(pipe, source)


def test_several_processes_share_the_rows_and_another_number_may_go_on(pipe, source, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert answer_jsonl(pipe, source, output, state=process(0, 3), **LENGTHS) == 3
    assert not output.exists()
    with pytest.raises(Killed):
        answer_jsonl(
            Stopping(pipe, 1), source, output, state=process(1, 3), batch_size=1, **LENGTHS
        )
    assert answer_jsonl(pipe, source, output, state=process(1, 2), **LENGTHS) == 1
    assert not output.exists()
    assert answer_jsonl(pipe, source, output, state=process(0, 2), **LENGTHS) == 2
    assert output.read_bytes() == expected(pipe, source)


def test_second_run_into_the_same_output_is_refused_at_once(pipe, source, tmp_path):
    output, refused = tmp_path / "answers.jsonl", []

    class Watched(Stopping):
        """While it decodes, the same command and one of another input are run again."""

        def __call__(self, *args, **kwargs):
            for options in (LENGTHS, LENGTHS | {"seed": 8}):
                with pytest.raises((OSError, ValueError)) as error:
                    answer_jsonl(Stopping(pipe, 0), source, output, **options)
                refused.append(str(error.value))
            return self.pipe(*args, **kwargs)

    assert answer_jsonl(Watched(pipe, 3), source, output, batch_size=3, **LENGTHS) == 7
    assert len(refused) == 6
    assert (
        refused[0]
        == f"`output` '{output}' is being written by another run: wait for its end, or stop it."
    )
    assert output.read_bytes() == expected(pipe, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl", "answers.jsonl.run.json", "questions.jsonl"
    ]  # fmt: skip


def test_processes_that_are_last_at_once_write_the_same(pipe, source, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    read = RunFiles.answers

    def overtaken(files):
        found = read(files)
        if len(found) == 7:
            monkeypatch.setattr(RunFiles, "answers", read)
            files.finish(read_rows(str(source)), "generated_text")
            assert not files.folder.exists()
        return found

    monkeypatch.setattr(RunFiles, "answers", overtaken)
    assert answer_jsonl(pipe, source, output, **LENGTHS) == 7
    assert output.read_bytes() == expected(pipe, source)


def test_complete_run_is_left_alone_even_if_it_was_killed_before_its_parts_went(
    pipe, source, tmp_path
):
    output = tmp_path / "answers.jsonl"
    answer_jsonl(pipe, source, output, **LENGTHS)
    before = output.stat()
    (tmp_path / "answers.jsonl.parts").mkdir()
    assert answer_jsonl(Stopping(pipe, 0), source, output, **LENGTHS) == 0
    assert output.stat().st_mtime_ns == before.st_mtime_ns
    assert not (tmp_path / "answers.jsonl.parts").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text('{"seed": 9')])
def test_answers_of_an_unknown_run_are_neither_taken_nor_thrown_away(
    pipe, source, tmp_path, damage
):
    output, about = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.run.json"
    with pytest.raises(Killed):
        answer_jsonl(Stopping(pipe, 2), source, output, batch_size=2, **LENGTHS)
    known = about.read_text()
    damage(about)
    with pytest.raises(ValueError, match="is of another input, model or setting"):
        answer_jsonl(pipe, source, output, **LENGTHS)
    about.write_text(known)
    assert answer_jsonl(pipe, source, output, **LENGTHS) == 3
    assert output.read_bytes() == expected(pipe, source)


def test_input_that_is_edited_while_it_is_answered_is_answered_as_it_was(pipe, source, tmp_path):
    output, right = tmp_path / "answers.jsonl", expected(pipe, source)

    class Edited(Stopping):
        def __call__(self, *args, **kwargs):
            source.write_text(source.read_text().replace("How", "Who"))
            return self.pipe(*args, **kwargs)

    assert answer_jsonl(Edited(pipe, 2), source, output, batch_size=3, **LENGTHS) == 7
    assert output.read_bytes() == right
    with pytest.raises(ValueError, match="is of another input"):
        answer_jsonl(pipe, source, output, **LENGTHS)


def test_run_is_not_continued_by_another_model_in_the_same_folder(pipe, source, tmp_path):
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        answer_jsonl(Stopping(pipe, 2), source, output, batch_size=2, **LENGTHS)
    weight, template = pipe.model.coupling_head.initial, pipe.tokenizer.chat_template
    changes = [
        (lambda: weight.data.add_(1e-3), lambda: weight.data.sub_(1e-3)),
        (
            lambda: setattr(pipe.tokenizer, "chat_template", template + " "),
            lambda: setattr(pipe.tokenizer, "chat_template", template),
        ),
    ]
    known = weight.detach().clone()
    for change, undo in changes:
        change()
        with pytest.raises(ValueError, match="is of another input, model"):
            answer_jsonl(pipe, source, output, **LENGTHS)
        undo()
        weight.data.copy_(known)
    assert answer_jsonl(pipe, source, output, **LENGTHS) == 3
    assert output.read_bytes() == expected(pipe, source)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"gen_length": 12}, {"temperature": 0.5}, {"prompt_column": "id_text"}, {}],
)
def test_run_is_not_continued_with_other_settings_or_another_input(pipe, source, tmp_path, change):
    output = tmp_path / "answers.jsonl"
    text = source.read_text().replace('"id":', '"id_text": "x", "id":')
    source.write_text(text)
    with pytest.raises(Killed):
        answer_jsonl(Stopping(pipe, 1), source, output, batch_size=1, **LENGTHS)
    if not change:
        source.write_text(text.replace("eggs", "egg"))
    with pytest.raises(ValueError, match=r"answers.jsonl.* is of another input, model or setting"):
        answer_jsonl(pipe, source, output, **(LENGTHS | change))


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b'{"question": "a"}\n{"question": "b\n', {}, "Line 2 of .* is not JSON"),
        (b'{"question": "a"}\n\n["b"]\n', {}, "Line 3 of .* is not a JSON object"),
        (b'{"question": "Zo\xeb?"}\n', {}, "Line 1 .* is not JSON"),
        (b'{"question": "a", "n": %s}\n' % (b"9" * 5000), {}, "Line 1 .* is not JSON .Exceeds"),
        (b'{"question": ""}\n', {}, "Line 1 .* text in `prompt_column` 'question', got ''"),
        (b'{"question": "a"}\n{"prompt": "b"}\n', {}, "Line 2 .* 'question', got None"),
        (b'{"text": "a"}\n', {}, "Line 1 .* has no text in `prompt_column` 'question', got None"),
        (b'{"q": 3}\n', {"prompt_column": "q"}, "'q', got 3"),
        (b'{"question": "a", "generated_text": ""}\n', {}, "has a column 'generated_text' already"),
        (b'{"question": "a"}\n{"question": "b \\ud83d c"}\n', {}, "Line 2 .* half of a surrogate"),
        (b'{"question": "%s"}\n' % (b"egg " * 200), {}, "Line 1 .* exceed the 128 positions"),
        (b'{"question": "<|mask|>"}\n{"question": "a"}\n', {"infill": True}, "Line 2 .*`infill`"),
        (b'{"question": "a", "gen_length": true}\n', {}, "Line 1 .*`gen_length` must be an integ"),
        (b'{"question": "a", "gen_length": 40}\n', {}, "Line 1 .* the number of blocks"),
        (b'{"question": "a", "seed": 1.5}\n', {}, "Line 1 .*`seed` must be an integer, got 1.5"),
        (b'{"question": "a"}\n', {"strategy": "luck"}, "^`strategy`"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence_that_gives_the_line(
    pipe, tmp_path, content, options, said
):
    source = tmp_path / "bad.jsonl"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        answer_jsonl(pipe, source, tmp_path / "answers.jsonl", **LENGTHS, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


BAD = {
    1: b'{"question": "Tom \\ud83d has 3 eggs."}',
    2: b'{"question": "cut',
    4: b'{"question": "%s"}' % (b"egg " * 200),
    5: b'{"question": "a", "gen_length": 0}',
    7: b"\x80",
}


@pytest.fixture
def with_bad_rows(source, tmp_path):
    """The seven questions, and bad rows in between, as lines 2, 3, 5, 6 and 8."""
    good, lines = source.read_bytes().splitlines(), []
    while good:
        lines.append(BAD[len(lines)] if len(lines) in BAD else good.pop(0))
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_bad_rows_are_skipped_counted_and_listed(folder, pipe, with_bad_rows, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    argv = ["generate", "--input", str(with_bad_rows), "--output", str(output), *OPTIONS]
    assert main([*argv, "--model", str(folder)]) == 1
    assert "Line 2 of" in capsys.readouterr().err
    assert not output.exists()
    assert main([*argv, "--model", str(folder), "--skip-bad-rows"]) == 0
    captured = capsys.readouterr()
    assert "5 rows are left out" in captured.err
    assert "Rows left out: 6: `gen_length` must be" in captured.err
    assert "7 rows answered now" in captured.out
    rows = [i for i in range(12) if i not in BAD]
    for row, line in zip(rows, output.read_text().splitlines(), strict=True):
        answered = json.loads(line)
        generator = torch.Generator().manual_seed(row)  # the seed is that of the row's place
        text = pipe(answered["question"], **LENGTHS, generator=generator).texts[0]
        assert answered["generated_text"] == text


def test_processes_skip_their_own_bad_rows_and_a_killed_run_goes_on(pipe, with_bad_rows, tmp_path):
    alone, output = tmp_path / "alone.jsonl", tmp_path / "answers.jsonl"

    def answer(pipe, output, *share) -> tuple[int, list[int]]:
        options = {"state": process(*share), "batch_size": 1, "skip_bad_rows": True, **LENGTHS}
        number, report = answered(pipe, with_bad_rows, output, **options)
        return number, sorted(chain(*report.left_out.values()))

    assert answer(pipe, alone, 0, 1) == (7, [2, 3, 5, 6, 8])
    with pytest.raises(Killed):
        answer(Stopping(pipe, 1), output, 0, 2)
    assert answer(pipe, output, 1, 2) == (3, [2, 6, 8])
    assert answer(pipe, output, 0, 2) == (3, [3, 5])
    assert output.read_bytes() == alone.read_bytes()


def test_file_of_another_origin_is_not_written_over(pipe, source, tmp_path, capsys, folder):
    output = tmp_path / "answers.jsonl"
    output.write_text("mine\n")
    argv = ["--input", str(source), "--output", str(output), "--model", str(folder), *OPTIONS]
    assert main(["generate", *argv]) == 1
    assert f"'{output}' is of another input, model or setting" in capsys.readouterr().err
    assert output.read_text() == "mine\n"


def command(folder: Path, source: Path, output: Path, num_processes: int) -> list[str]:
    start = [sys.executable, "-m"]
    if num_processes > 1:
        start += ["accelerate.commands.launch", "--multi_gpu", "--num_processes"]
        start += [str(num_processes), "--main_process_port", "0", "-m"]
    files = ["--input", str(source), "--output", str(output), "--batch-size", "2"]
    return [*start, "codd_hf.cli", "generate", "--model", str(folder), *files, *OPTIONS]


def without_gpus() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def one_of_several(argv: list[str], folder: Path) -> None:
    """The command, as a process whose output goes to a file."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with (folder / os.environ["RANK"]).open("w") as told, redirect_stdout(told):
        assert main(argv) == 0


def test_two_processes_give_what_one_gives(folder, pipe, source, tmp_path):
    output = tmp_path / "answers.jsonl"
    argv = command(folder, source, output, 1)[3:]
    launch.run(one_of_several, argv, tmp_path, processes=2, told_cpu=False)
    for rank, number in ((0, 4), (1, 3)):
        said = (tmp_path / str(rank)).read_text()
        assert f"process {rank}: {number} rows answered now" in said
    assert output.read_bytes() == expected(pipe, source)


@pytest.mark.slow
def test_accelerate_launch_runs_two_processes_that_give_what_one_gives(
    folder, pipe, source, tmp_path
):
    output = tmp_path / "answers.jsonl"
    done = subprocess.run(
        command(folder, source, output, 2),
        env=without_gpus(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "process 0: 4 rows answered now" in done.stdout
    assert "process 1: 3 rows answered now" in done.stdout
    assert output.read_bytes() == expected(pipe, source)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_runs_killed_at_random_moments_lose_and_repeat_nothing(
    folder, pipe, tmp_path, num_processes
):
    """Kills the launcher alone, one worker or all of them; whoever is left over goes on."""
    source = write_questions(tmp_path / "questions.jsonl", 150)
    answers = expected(pipe, source)
    draw = random.Random(num_processes)
    workers: list[psutil.Process] = []
    kills = completed = 0
    while kills < 12 or completed == 0:
        output = tmp_path / f"answers-{completed}.jsonl"
        parts = tmp_path / f"answers-{completed}.jsonl.parts"
        # Not a pipe, which workers that outlive the launcher would hold open.
        with (tmp_path / "log").open("ab") as log:
            launcher = subprocess.Popen(
                command(folder, source, output, num_processes), env=without_gpus(), stderr=log
            )
        before, began = bytes_in(parts), time.monotonic()
        early = draw.uniform(0, 10) if draw.random() < 0.25 else 600
        while launcher.poll() is None and time.monotonic() - began < early:
            time.sleep(0.01)
            if bytes_in(parts) != before:
                time.sleep(draw.uniform(0, 1))
                break
        alive = descendants(launcher.pid)
        workers += alive
        if kills < 12 and launcher.poll() is None:
            victims = [[launcher], alive[-1:], [launcher, *alive]]
            for victim in victims[draw.randrange(3) if num_processes > 1 else 0]:
                os.kill(victim.pid, signal.SIGKILL)
            kills += 1
        code = launcher.wait(timeout=600)
        print(f"{kills} kills: code {code}, {bytes_in(parts)} bytes of answers", flush=True)
        if code == 0:
            assert output.read_bytes() == answers
            assert not parts.exists()
            completed += 1
    for worker in workers:
        if worker.is_running():
            worker.kill()
    for path in tmp_path.glob("answers-*.jsonl"):
        assert path.read_bytes() == answers
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if "error: " in line]
    # A process that a kill left over still writes: the next run is refused, and comes back.
    assert all("is being written by another run" in line for line in errors if "codd-hf" in line)


def bytes_in(parts: Path) -> int:
    return sum(path.stat().st_size for path in parts.glob("part-*"))
