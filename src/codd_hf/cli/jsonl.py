"""Answers to the rows of a JSONL file, by one process or several, that survive being killed.

A row's answer depends on the row, its seed and the settings alone, never on its batch or process.
Row `i` belongs to process `i % num_processes`, which appends the answers of each batch to a file of
its own in `<output>.parts` and forces them to the disk before it goes on. The process that finds
all rows answered writes `<output>`, in the order of the input, in one atomic step. A later run
takes the whole lines of all parts as done, whatever the number of processes that wrote them.
`<output>.run.json` says what the run was: only the same input, model and settings continue it.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import shown
from ..checks.settings import settings_of
from ..data.fingerprint import json_fingerprint, pipeline_fingerprint
from ..data.sources import PROMPT_COLUMNS, BadRowError, Row, RowReport, read_rows
from ..decoding.choices import SETTINGS
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.files import append_results, atomic_write, locked, make_durable, read_results
from .generate import GenerateSettings

OWN = ("gen_length", "num_inference_steps")
"""Choices that a row may have of its own, beside `seed`."""


def answer_jsonl(
    pipeline: CoDDPipeline, settings: GenerateSettings, call: dict[str, Any], state: PartialState
) -> tuple[int, RowReport]:
    """Answers every row of a JSONL file; the same call continues a killed run.

    Args:
        pipeline: on this process's device, with a tokenizer.
        settings: the files, and what concerns them.
        call: arguments of the pipeline's call (`gen_length`, `infill`, `sampling`, ...).
        state: accelerate's; several processes need one file system.

    Returns:
        The number of rows that this process answered now, and its report on bad ones.

    Raises:
        ValueError: a row or an argument is bad, or the output was begun by a run of another input,
            model or setting.
        OSError: a file cannot be read or written, or another run is writing it.
    """
    source, output = str(settings.input), Path(str(settings.output))
    draws = {name: call[name] for name in SETTINGS if name in call}
    pipeline.scheduler.settings.updated(**draws).check_vocabulary(pipeline.model.config.vocab_size)
    rows = read_rows(source)
    columns = {name for _, row in rows if isinstance(row, dict) for name in row}
    usual = next((name for name in PROMPT_COLUMNS if name in columns), PROMPT_COLUMNS[0])
    column = settings.prompt_column or usual
    report = RowReport(repr(source), settings.skip_bad_rows, "Line")
    mine, good = range(state.process_index, len(rows), state.num_processes), {}
    for i in mine:
        number, row = rows[i]
        try:
            if isinstance(row, BadRowError):
                raise row
            whole = {"seed": settings.seed + i, **{n: call.get(n) for n in OWN}, **row}
            _check(pipeline, whole, column, settings.output_column, call)
            good[i] = whole
        except (TypeError, ValueError) as error:
            report.refuse(number, str(error).rstrip("."))
    run = {
        "seed": settings.seed,
        "input": json_fingerprint([str(row) for _, row in rows]),
        "prompt_column": column,
        "output_column": settings.output_column,
        "model": pipeline_fingerprint(pipeline),
    }
    files = RunFiles(output, run | call | pipeline.task(**call))
    state.wait_for_everyone()  # nothing is begun before all have looked
    with locked(files.lock, f"`output` {str(output)!r}", state):
        if files.is_complete():
            return 0, report
        state.wait_for_everyone()
        if state.is_main_process:
            files.folder.mkdir(exist_ok=True)
            with atomic_write(files.about) as new:  # nothing is answered yet
                new.write_text(files.run)
        state.wait_for_everyone()
        done, part = files.answers(), files.folder / f"part-{state.process_index:05d}.jsonl"
        append_results(part, [(i, None) for i in mine if i not in good and i not in done])
        left = [i for i in good if i not in done]
        with tqdm(
            total=len(left), unit="row", disable=None if state.is_main_process else True
        ) as bar:
            for start in range(0, len(left), settings.batch_size):
                batch = left[start : start + settings.batch_size]
                texts = pipeline(
                    [good[i][column] for i in batch],
                    generator=[torch.Generator().manual_seed(good[i]["seed"]) for i in batch],
                    **call | {name: [good[i][name] for i in batch] for name in OWN},
                ).texts
                append_results(part, zip(batch, texts or (), strict=True))
                bar.update(len(batch))
        files.finish(rows, settings.output_column)
    return len(left), report


def _check(
    pipeline: CoDDPipeline, row: dict[str, Any], column: str, new: str, call: dict[str, Any]
) -> None:
    """Raises for a row that cannot be decoded, before hours have been spent on others."""
    prompt = row.get(column)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"has no text in `prompt_column` {column!r}, got {shown(prompt)}")
    if new in row:
        raise ValueError(f"has a column {new!r} already: name another")
    settings_of(GenerateSettings)["seed"].checked("seed", row["seed"])
    own = {name: row[name] for name in OWN}
    pipeline.prepare(prompt=[prompt], **call | own)


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
            answered = [
                json.dumps({**row, output_column: answers[i]}, ensure_ascii=False) + "\n"
                for i, (_, row) in enumerate(rows)
                if answers[i] is not None and isinstance(row, dict)
            ]
            # Half of a surrogate pair becomes JSON's escape of it.
            merged.write_bytes("".join(answered).encode(errors="backslashreplace"))
            make_durable(merged)
            merged.replace(self.output)
            make_durable(self.output.parent)
            self.tidy()

    def tidy(self) -> None:
        """Removes what a complete run does not need."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a complete run is not written again
            self.lock.unlink()
