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
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import integer
from ..data.fingerprint import (
    json_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from ..data.rows import read_rows
from ..decoding.generation_settings import SETTINGS
from ..decoding.loop import lay_out
from ..runtime.files import atomic_write, make_durable, read_json
from ..runtime.locks import locked
from .jsonl_rows import PromptRows

if TYPE_CHECKING:
    from ..pipelines.pipeline_codd import CoDDPipeline

LARGEST_SEED = 2**63 - 1
DIGESTS = {
    "input_digest": "another content of its input",
    "model_digest": "another model (other weights, settings or tokenizer)",
}
"""How an error names what differs where a digest does."""


def answer_jsonl(
    pipeline: CoDDPipeline,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    prompt_column: str | None = None,
    output_column: str = "generated_text",
    batch_size: int = 8,
    seed: int = 0,
    gen_length: int | None = None,
    num_inference_steps: int | None = None,
    use_chat_template: bool = True,
    state: PartialState | None = None,
    progress: bool = False,
    skip: Callable[[str], None] | None = None,
    **settings: Any,
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
        gen_length: as in the pipeline.
        num_inference_steps: as in the pipeline.
        use_chat_template: as in the pipeline.
        state: accelerate's, when there are several processes; they need one file system.
        progress: whether the main process shows a bar of its rows.
        skip: is told, in a sentence, of each bad row of this process; these rows are left out of
            `output`. Without it a bad row is an error, before any row is answered.
        **settings: arguments of the pipeline's call (`block_length`, `infill`, `sampling`, ...).

    Returns:
        The number of rows that this process answered now.

    Raises:
        ValueError: a row or an argument is bad, no row is left, or `output` was begun by a run of
            another input, model or setting.
        OSError: a file cannot be read or written, `output` exists and is of no such run, or another
            run is writing it.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    model, tokenizer = pipeline.model, pipeline.tokenizer
    if tokenizer is None:
        raise ValueError("`pipeline` needs a tokenizer for the texts of `source`.")
    draws = {name: settings[name] for name in SETTINGS if name in settings}
    pipeline.scheduler.draw_settings(**draws).check_vocabulary(model.config.vocab_size)
    found = PromptRows.read(Path(source), prompt_column, output_column)
    prompt_column, rows = found.prompt_column, found.rows
    lengths = {"gen_length": gen_length, "num_inference_steps": num_inference_steps}
    call = {"use_chat_template": use_chat_template, **settings}
    # All that an answer depends on beside its row.
    run = {
        "input_digest": json_fingerprint([str(columns) for _, columns in rows]),
        "prompt_column": prompt_column,
        "output_column": output_column,
        "seed": seed,
        "model": model.config._name_or_path,
        "model_digest": json_fingerprint(
            [
                weights_fingerprint(model),
                settings_fingerprint(model.config),
                tokenizer_fingerprint(tokenizer),
                tokenizer.special_tokens_map,
                tokenizer.chat_template,
            ]
        ),
        "scheduler": {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
        **call,
        **pipeline.task(**lengths, **settings),
    }
    files = RunFiles(Path(output), run)
    if files.is_complete():
        return 0

    def values(i: int) -> dict[str, Any]:
        return {"seed": seed + i, **lengths, **rows[i][1]}

    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    wait = (lambda: None) if state is None else state.wait_for_everyone
    mine, bad = range(index, len(rows), count), []
    for i in mine:
        fault = found.bad.get(i)
        if fault is None:
            try:
                _check(pipeline, values(i), prompt_column, call)
            except (TypeError, ValueError) as error:
                fault = f"{found.where(i)}: {error}"
        if fault is not None and skip is None:
            raise ValueError(fault)
        if fault is not None:
            skip(fault)
            bad.append(i)
    if len(bad) == len(rows):
        raise ValueError(f"`source` {str(source)!r} has no row that can be answered.")
    wait()  # nothing is begun, and no process may be done already, before all have looked
    with locked(files.lock, f"`output` {str(output)!r}", state):
        complete = files.is_complete()
        if index == 0 and not complete:
            files.begin()
        wait()
        if complete:
            return 0
        files.check_same()
        done = files.answers()
        files.append(index, [(i, None) for i in bad if i not in done])
        left = [i for i in mine if i not in done and i not in bad]
        with tqdm(total=len(left), unit="row", disable=not progress or index > 0) as bar:
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                columns = list(map(values, batch))
                texts = pipeline(
                    [column[prompt_column] for column in columns],
                    generator=[torch.Generator().manual_seed(c["seed"]) for c in columns],
                    **{name: [column[name] for column in columns] for name in lengths},
                    **call,
                ).texts
                files.append(index, zip(batch, texts, strict=True))
                bar.update(len(batch))
        files.finish([columns for _, columns in rows])
    return len(left)


def _check(
    pipeline: CoDDPipeline, row: dict[str, Any], prompt_column: str, call: dict[str, Any]
) -> None:
    """Raises for a row that cannot be decoded, before hours have been spent on others."""
    integer("seed", row["seed"], most=LARGEST_SEED)
    lengths = {name: row[name] for name in ("gen_length", "num_inference_steps")}
    ids, mask, decoding = pipeline.prepare(prompt=[row[prompt_column]], **call | lengths)
    lay_out(pipeline.model, decoding, ids, mask)


class RunFiles:
    """The files of a run: the result, what the run is, and the parts on the way there.

    Args:
        output: the result.
        run: what must be the same for a run to be continued; values that JSON has.
    """

    def __init__(self, output: Path, run: dict[str, Any]) -> None:
        if not output.name:
            raise ValueError(f"`output` must be the path of a file, got {str(output)!r}.")
        self.output, self.run = output, json.loads(json.dumps(run))
        self.about = output.with_name(output.name + ".run.json")
        self.lock = output.with_name(output.name + ".lock")
        self.folder = output.with_name(output.name + ".parts")

    def is_complete(self) -> bool:
        """Whether this very run has written its result.

        Raises:
            ValueError: the files are of another run that has answered rows.
            OSError: there are a result or answers, and nothing says of which run.
        """
        answered = self.output.exists() or bool(self.answers())
        if answered and not self.about.exists():
            there = self.output if self.output.exists() else self.folder
            raise FileExistsError(
                f"`output` {str(self.output)!r}: {str(there)!r} exists, and no {self.about.name!r} "
                "says of which run it is: remove it, or give another file."
            )
        if answered:
            self.check_same()
        if not self.output.exists():
            return False
        self.tidy()  # a run may have been killed before it came to this
        return True

    def check_same(self) -> None:
        """Raises a ValueError where what has begun is another run."""
        before = read_json(self.about)
        for name in {**before, **self.run}:
            theirs, ours = before.get(name), self.run.get(name)
            if json.dumps(theirs) != json.dumps(ours):  # NaN is itself here
                what = DIGESTS.get(name, f"`{name}` {theirs!r}, not {ours!r}")
                raise ValueError(
                    f"`output` {str(self.output)!r} was begun with {what}: run it as it was to go "
                    "on, or give another file; what is answered stays."
                )

    def begin(self) -> None:
        """Makes the folder of the parts and says what the run is; nothing is answered yet."""
        self.folder.mkdir(exist_ok=True)
        with atomic_write(self.about) as new:
            new.write_text(json.dumps(self.run, indent=2) + "\n")

    def append(self, process: int, answers: Iterable[tuple[int, str | None]]) -> None:
        """Adds rows and their texts (None: left out) to a process's part, on the disk."""
        # A line begins with its break, so that one that a kill tore ends there.
        lines = ("\n" + json.dumps({"row": row, "text": text}) for row, text in answers)
        data, path = "".join(lines).encode(), self.folder / f"part-{process:05d}.jsonl"
        # Unbuffered: a process that a kill left over may write to the same file.
        with path.open("ab", buffering=0) as file:
            if file.write(data) < len(data):
                raise OSError(f"{str(path)!r} could not be written: is the disk full?")
            os.fsync(file.fileno())
        make_durable(self.folder)

    def answers(self) -> dict[int, str | None]:
        """The texts of the rows that are done; None where a row was left out."""
        found: dict[int, str | None] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            for _, answer in read_rows(str(path)):
                if isinstance(answer, dict) and {"row", "text"} <= answer.keys():
                    found.setdefault(answer["row"], answer["text"])
        return found

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the result if all rows are done; processes that come at once write the same."""
        try:
            answers = self.answers()
            if len(answers) < len(rows) or read_json(self.about) != self.run:
                return
            merged = self.folder / f"merged-{uuid.uuid4().hex}.jsonl"
            with merged.open("wb") as file:
                for i, row in enumerate(rows):
                    if answers[i] is not None:
                        answered = {**row, self.run["output_column"]: answers[i]}
                        line = json.dumps(answered, ensure_ascii=False) + "\n"
                        # Half of a surrogate pair becomes JSON's escape of it.
                        file.write(line.encode(errors="backslashreplace"))
            make_durable(merged)
            merged.replace(self.output)
        except FileNotFoundError:  # another process has finished
            if not self.output.exists():
                raise
            return
        make_durable(self.output.parent)
        self.tidy()

    def tidy(self) -> None:
        """Removes what a complete run does not need."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a complete run is not written again
            self.lock.unlink()
