"""Answers to the rows of a JSONL file, by one process or several, that survive being killed.

A row's answer depends on the row, its seed and the settings alone, never on its batch or process.
Row `i` belongs to process `i % num_processes`, which appends the answers of each batch to a file of
its own in `<output>.parts` and forces them to the disk before it goes on. The process that finds
all rows answered writes `<output>`, in the order of the input, in one atomic step. A later run
takes the whole lines of all parts as done, whatever the number of processes that wrote them.
`<output>.run.json` says what the run was: only the same input, model and settings continue it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import integer, shown
from ..data.fingerprint import (
    json_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from ..data.rows import BadRowError, Row, RowReport, read_rows
from ..decoding.choices import SETTINGS
from ..decoding.loop import lay_out
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.files import atomic_write, make_durable
from ..runtime.journal import append_results, read_results
from ..runtime.locks import locked

USUAL_PROMPTS = ("question", "prompt")
OWN = ("gen_length", "num_inference_steps")
"""Choices that a row may have of its own, beside `seed`."""
LARGEST_SEED = 2**63 - 1


def answer_jsonl(
    pipeline: CoDDPipeline,
    source: Path,
    output: Path,
    *,
    prompt_column: str | None = None,
    output_column: str = "generated_text",
    batch_size: int = 8,
    seed: int = 0,
    report: RowReport,
    state: PartialState | None = None,
    **call: Any,
) -> int:
    """Answers every row of a JSONL file; the same call continues a killed run.

    The columns `gen_length`, `num_inference_steps` and `seed`, where a row has them, stand for the
    arguments in its row.

    Args:
        pipeline: on this process's device, with a tokenizer.
        source: a JSONL file, an object a line.
        output: the file to write: the rows of `source`, each with one more column.
        prompt_column: the column of the prompts; default `question` or else `prompt`.
        output_column: the new column.
        batch_size: rows decoded together; it changes the speed, not the answers.
        seed: row `i`, from 0, is drawn with seed `seed + i`; a row's own seed is taken as it is.
        report: takes the bad rows of this process, which are left out of `output`, or raises.
        state: accelerate's, when there are several processes; they need one file system.
        **call: arguments of the pipeline's call (`gen_length`, `infill`, `sampling`, ...).

    Returns:
        The number of rows that this process answered now.

    Raises:
        ValueError: a row or an argument is bad, or `output` was begun by a run of another input,
            model or setting.
        OSError: a file cannot be read or written, or another run is writing it.
    """
    draws = {name: call[name] for name in SETTINGS if name in call}
    pipeline.scheduler.settings.updated(**draws).check_vocabulary(pipeline.model.config.vocab_size)
    rows = read_rows(str(source))
    good = [row for _, row in rows if isinstance(row, dict)]
    usual = (column for row in good for column in USUAL_PROMPTS if column in row)
    column = prompt_column or next(usual, None)
    if column is None and (good or not rows):
        raise ValueError(f"`prompt_column` must be given: {source} has no question or prompt.")
    task = pipeline.task(**call)
    own = {name: call.pop(name, None) for name in OWN}
    files = RunFiles(
        output,
        {
            "input": json_fingerprint([str(row) for _, row in rows]),
            "prompt_column": column,
            "output_column": output_column,
            "seed": seed,
            "model": _digest(pipeline),
            **call,
            **task,
        },
    )

    def values(i: int) -> dict[str, Any]:
        return {"seed": seed + i, **own, **rows[i][1]}

    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    mine, bad = range(index, len(rows), count), set()
    for i in mine:
        number, row = rows[i]
        try:
            if isinstance(row, BadRowError):
                raise row
            if not isinstance(row.get(column), str) or not row[column]:
                raise ValueError(f"has no text in column {column!r}, got {shown(row.get(column))}")
            if output_column in row:
                raise ValueError(f"has a column {output_column!r} already: name another")
            integer("seed", values(i)["seed"], most=LARGEST_SEED)
            lengths = {name: values(i)[name] for name in OWN}
            ids, mask, decoding = pipeline.prepare(prompt=[row[column]], **lengths, **call)
            lay_out(pipeline.model, decoding, ids, mask)
        except (TypeError, ValueError) as error:
            report.refuse(number, str(error).rstrip("."))
            bad.add(i)

    def wait() -> None:
        if state is not None:
            state.wait_for_everyone()

    wait()  # nothing is begun, and no process may be done already, before all have looked
    with locked(files.lock, f"`output` {str(output)!r}", state):
        complete = files.is_complete()
        wait()
        if complete:
            return 0
        if index == 0:
            files.begin()
        wait()
        done, part = files.answers(), files.folder / f"part-{index:05d}.jsonl"
        append_results(part, [(i, None) for i in sorted(bad.difference(done))])
        left = [i for i in mine if i not in done and i not in bad]
        with tqdm(total=len(left), unit="row", disable=True if index else None) as bar:
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                columns = [values(i) for i in batch]
                texts = pipeline(
                    [row[column] for row in columns],
                    generator=[torch.Generator().manual_seed(row["seed"]) for row in columns],
                    **{name: [row[name] for row in columns] for name in OWN},
                    **call,
                ).texts
                append_results(part, zip(batch, texts, strict=True))
                bar.update(len(batch))
        files.finish(rows, output_column)
    return len(left)


def _digest(pipeline: CoDDPipeline) -> str:
    """Of all in a pipeline on which its texts depend."""
    model, tokenizer = pipeline.model, pipeline.tokenizer
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    vocabulary = tokenizer_fingerprint(tokenizer)
    spelling = [tokenizer.special_tokens_map, tokenizer.chat_template]
    parts = [weights_fingerprint(model), settings_fingerprint(model.config)]
    return json_fingerprint([*parts, scheduler, vocabulary, *spelling])


class RunFiles:
    """The files of a run: the result, what the run is, and the parts on the way there.

    Args:
        output: the result.
        run: what must be the same for a run to be continued; values that JSON has.
    """

    def __init__(self, output: Path, run: dict[str, Any]) -> None:
        self.output, self.run = output, json.dumps(run, indent=2) + "\n"
        self.about = output.with_name(output.name + ".run.json")
        self.lock = output.with_name(output.name + ".lock")
        self.folder = output.with_name(output.name + ".parts")

    def is_complete(self) -> bool:
        """Whether this very run has written its result.

        Raises:
            ValueError: the result or the answers that are there are of another run.
        """
        if not (self.output.exists() or self.answers()):
            return False
        if not self.about.exists() or self.about.read_text() != self.run:
            raise ValueError(
                f"`output` {str(self.output)!r} is of another input, model or setting: run it as "
                "it was to go on, or give another file; what is there stays."
            )
        if self.output.exists():
            self.tidy()  # a run may have been killed before it came to this
        return self.output.exists()

    def begin(self) -> None:
        """Makes the folder of the parts and says what the run is; nothing is answered yet."""
        self.folder.mkdir(exist_ok=True)
        with atomic_write(self.about) as new:
            new.write_text(self.run)

    def answers(self) -> dict[str | int, str | None]:
        """The texts of the rows that are done; None where a row was left out."""
        found: dict[str | int, str | None] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            found = read_results(path) | found
        return found

    def finish(self, rows: list[Row], output_column: str) -> None:
        """Writes the result if all rows are done; processes that come at once write the same."""
        merged = self.folder / f"merged-{os.getpid()}.jsonl"
        with contextlib.suppress(FileNotFoundError):  # another process has finished
            answers = self.answers()
            if len(answers) < len(rows) or self.about.read_text() != self.run:
                return
            with merged.open("wb") as file:
                for i, (_, row) in enumerate(rows):
                    if answers[i] is not None:
                        line = json.dumps({**row, output_column: answers[i]}, ensure_ascii=False)
                        # Half of a surrogate pair becomes JSON's escape of it.
                        file.write(f"{line}\n".encode(errors="backslashreplace"))
            make_durable(merged)
            merged.replace(self.output)
            make_durable(self.output.parent)
            self.tidy()

    def tidy(self) -> None:
        """Removes what a complete run does not need."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a complete run is not written again
            self.lock.unlink()
