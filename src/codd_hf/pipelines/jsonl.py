"""Answers to the rows of a JSONL file, by one process or several, that survive being killed.

A row's answer is a function of the row, its seed and the settings alone, never of its batch or its
process. Row `i` belongs to process `i % num_processes`, which appends the answers of a batch to its
own file in the folder `<output>.parts` and forces them to the disk before it goes on. Whoever finds
all rows answered writes `<output>`, in the order of the input, in one atomic step. A later run
takes all whole lines of all parts as done, whatever the number of processes that wrote them; a line
that a kill tore is no JSON and its row is done again. `<output>.run.json` says what the run was, so
that it is continued by the same settings only.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..decoding import lay_out
from ..decoding_arguments import DecodingArguments
from .jsonl_rows import JSONLRows, line_at, parsed
from .prompts import encode_prompts

if TYPE_CHECKING:
    from .pipeline_codd import CoDDPipeline


def answer_jsonl(
    pipeline: CoDDPipeline,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    prompt_column: str | None = None,
    output_column: str = "generated_text",
    batch_size: int = 8,
    seed: int = 0,
    gen_length: int = 128,
    num_inference_steps: int = 32,
    state: PartialState | None = None,
    progress: bool = False,
    use_chat_template: bool = True,
    **settings: Any,
) -> int:
    """Answers every row of a JSONL file.

    A killed run is continued by the same call, with any batch size and number of processes.

    The columns `gen_length`, `num_inference_steps` and `seed`, where a line has them, stand for the
    arguments in its row.

    Args:
        pipeline: on this process's device, with a tokenizer.
        source: a JSONL file, an object a line (blank lines are passed over).
        output: the file to write: the lines of `source` as they are, with one more column.
        prompt_column: the column with the prompt, a text; default `question` or else `prompt`.
        output_column: the new column.
        batch_size: rows decoded together; it changes the speed, not the answers.
        seed: row `i`, counted from 0, is drawn with a generator of seed `seed + i`; a line's own
            seed is taken as it is.
        gen_length: tokens to generate in each row.
        num_inference_steps: the most backbone passes for a row.
        state: accelerate's, when there are several processes; they need one file system.
        progress: whether the main process shows a bar of its rows.
        use_chat_template: as in the pipeline.
        **settings: arguments of the pipeline's call (`block_length`, `infill`, `sampling`, ...).

    Returns:
        The number of rows that this process answered now.

    Raises:
        ValueError: a line is no JSON object, has no prompt, has `output_column` already or a column
            `gen_length`, `num_inference_steps` or `seed` that is no integer, a prompt cannot be
            decoded, `batch_size` is below 1, or another run has begun to write `output`.
        OSError: a file cannot be read or written, or `output` exists and is of no such run.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    rows = JSONLRows.read(Path(source), prompt_column, output_column)
    run = {
        "input_sha256": rows.sha256,
        "num_rows": len(rows),
        "prompt_column": rows.prompt_column,
        "output_column": output_column,
        "seed": seed,
        "model": pipeline.model.config._name_or_path,
        "use_chat_template": use_chat_template,
        "gen_length": gen_length,
        "num_inference_steps": num_inference_steps,
        **settings,
        "scheduler": {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
    }
    lengths = {"gen_length": gen_length, "num_inference_steps": num_inference_steps}
    files = RunFiles(Path(output), run)
    complete = files.is_complete()
    for row in range(index, 0 if complete else len(rows), count):
        _check_row(pipeline, rows, row, use_chat_template, lengths | settings)
    if state is not None:
        # Nothing is begun, and no process may be done already, before all have looked.
        state.wait_for_everyone()
    if index == 0 and not complete:
        files.begin()
    if state is not None:
        state.wait_for_everyone()
    if complete:
        return 0

    done = files.answers()
    own = [row for row in range(index, len(rows), count) if row not in done]
    with (
        files.part(index) as part,
        tqdm(total=len(own), unit="row", disable=not (progress and index == 0)) as bar,
    ):
        for start in range(0, len(own), batch_size):
            batch = own[start : start + batch_size]
            values = [rows.values(row) for row in batch]
            seeds = [v.get("seed", seed + row) for v, row in zip(values, batch, strict=True)]
            texts = pipeline(
                [v[rows.prompt_column] for v in values],
                use_chat_template=use_chat_template,
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                **{name: [v.get(name, usual) for v in values] for name, usual in lengths.items()},
                **settings,
            ).texts
            part.append(zip(batch, texts, strict=True))
            bar.update(len(batch))
    files.finish(rows)
    return len(own)


def _check_row(
    pipeline: CoDDPipeline,
    rows: JSONLRows,
    row: int,
    use_chat_template: bool,
    call: dict[str, Any],
) -> None:
    """Finds a row that cannot be decoded before hours have been spent on others.

    Args:
        pipeline: with a tokenizer.
        rows: the file.
        row: which one.
        use_chat_template: as in the pipeline.
        call: other arguments of the pipeline.
    """
    config, values = pipeline.model.config, rows.values(row)
    task = {f.name: call[f.name] for f in fields(DecodingArguments) if f.name in call}
    task |= {name: values.get(name, task[name]) for name in ("gen_length", "num_inference_steps")}
    try:
        ids, mask = encode_prompts(
            [values[rows.prompt_column]],
            None,
            None,
            None,
            tokenizer=pipeline.tokenizer,
            vocab_size=config.vocab_size,
            mask_token_id=config.mask_token_id,
            use_chat_template=use_chat_template,
            add_generation_prompt=True,
            chat_template_kwargs={},
            infill=call.get("infill", False),
        )
        arguments = DecodingArguments.check(pipeline.scheduler, config, 1, settings={}, **task)
        lay_out(config, ids, mask, [], arguments, pipeline.model.window_length)
    except ValueError as error:
        raise ValueError(f"Line {rows.numbers[row]} of {str(rows.path)!r}: {error}") from error


@dataclass
class RunFiles:
    """The files of a run: the result, what the run is, and the parts on the way there.

    Attributes:
        output: the result.
        run: what must be the same for a run to be continued; values that JSON has.
    """

    output: Path
    run: dict[str, Any]

    def __post_init__(self) -> None:
        self.run = json.loads(json.dumps(self.run))
        self.about = self.output.with_name(self.output.name + ".run.json")
        self.folder = self.output.with_name(self.output.name + ".parts")

    def is_complete(self) -> bool:
        """Whether this very run has written its result.

        Raises:
            ValueError: the files are of a run with other settings that has answered rows.
            OSError: there is a result, and nothing says of which run.
        """
        if not self.about.exists():
            if self.output.exists():
                raise FileExistsError(
                    f"`output` {str(self.output)!r} exists: remove it or give another file."
                )
            return False
        before = json.loads(self.about.read_text())
        answered = self.output.exists() or bool(self.answers())
        for name in {**before, **self.run}:
            if answered and before.get(name) != self.run.get(name):
                raise ValueError(
                    f"`output` {str(self.output)!r} was begun with `{name}` {before.get(name)!r}, "
                    f"not {self.run.get(name)!r}: give another file, or remove it, "
                    f"{self.about.name!r} and {self.folder.name!r} to begin anew."
                )
        return self.output.exists()

    def begin(self) -> None:
        """Makes the folder of the parts and says what the run is."""
        if not self.about.exists() or json.loads(self.about.read_text()) != self.run:
            # Parts that hold nothing, or of which nothing says what run they belong to.
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / "run.json"
        with temporary.open("w") as file:
            file.write(json.dumps(self.run, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.about)
        _sync_folder(self.output.parent)

    def part(self, process: int) -> Part:
        return Part(self.folder / f"part-{process:05d}.jsonl")

    def answers(self) -> dict[int, tuple[Path, int]]:
        """The rows that have been answered: in which part, and from which byte on."""
        found: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    record = parsed(line)
                    if record is not None:
                        found.setdefault(record["row"], (path, offset))
                    offset += len(line)
        return found

    def finish(self, rows: JSONLRows) -> None:
        """Writes the result if all rows are answered.

        The last process to come here finds them so. Two that come at once write the same; so does
        a process of a killed run that went on without its launcher.
        """
        try:
            answers = self.answers()
            if len(answers) < len(rows) or json.loads(self.about.read_text()) != self.run:
                return
            temporary = self.folder / f"merged-{uuid.uuid4().hex}.jsonl"
            with temporary.open("wb") as merged:
                for line in _merged_lines(rows, answers, self.run["output_column"]):
                    merged.write(line)
                merged.flush()
                os.fsync(merged.fileno())
            temporary.replace(self.output)
        except FileNotFoundError:
            if not self.output.exists():
                raise
            return
        _sync_folder(self.output.parent)
        shutil.rmtree(self.folder, ignore_errors=True)


class Part:
    """A file of answers, one a line, that only grows.

    Args:
        path: the file; what is in it stays.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)
        if self.file.tell():
            with path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read() != b"\n":
                    # What a kill tore becomes a line of its own, which is no JSON.
                    self.file.write(b"\n")
        _sync_folder(path.parent)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def append(self, answers: Iterator[tuple[int, str]]) -> None:
        """Adds rows and their texts, and returns when they are on the disk."""
        lines = (json.dumps({"row": row, "text": text}) + "\n" for row, text in answers)
        data = "".join(lines).encode()
        # All at once, and unbuffered: a process that a kill left over may write to the same file.
        if self.file.write(data) < len(data):
            raise OSError(f"{self.file.name!r} could not be written to its end: is the disk full?")
        os.fsync(self.file.fileno())


def _merged_lines(
    rows: JSONLRows, answers: dict[int, tuple[Path, int]], column: str
) -> Iterator[bytes]:
    """The lines of the input, byte by byte as they are, with one more column each."""
    opened: dict[Path, BinaryIO] = {}
    try:
        with rows.path.open("rb") as source:
            for row in range(len(rows)):
                path, offset = answers[row]
                if path not in opened:
                    opened[path] = path.open("rb")
                text = parsed(line_at(opened[path], offset))["text"]
                line = line_at(source, rows.offsets[row]).rstrip()
                added = f", {json.dumps(column)}: {json.dumps(text, ensure_ascii=False)}}}\n"
                yield line.removesuffix(b"}").rstrip() + added.encode()
    finally:
        for file in opened.values():
            file.close()


def _sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk, where that can be done (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
