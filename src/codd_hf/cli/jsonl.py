"""Answers to the rows of a JSONL file, by one process or several, that survive being killed.

A row's answer is a function of the row, its seed and the settings alone, never of its batch or its
process. Row `i` belongs to process `i % num_processes`, which appends the answers of a batch to its
own file in the folder `<output>.parts` and forces them to the disk before it goes on. Whoever finds
all rows answered writes `<output>`, in the order of the input, in one atomic step. A later run
takes all whole lines of all parts as done, whatever the number of processes that wrote them; a line
that a kill tore is no JSON and its row is done again. `<output>.run.json` says what the run was, so
that it is continued on the same input, by the same model and settings only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.fingerprint import PASSING, weights_fingerprint
from ..decoding.arguments import DecodingArguments
from ..decoding.generation_settings import SETTINGS, task_of_call
from ..decoding.loop import lay_out
from ..pipelines.prompts import encode_prompts
from ..runtime.locks import locked
from .jsonl_files import RunFiles
from .jsonl_rows import SEEDS, JSONLRows

if TYPE_CHECKING:
    from ..pipelines.pipeline_codd import CoDDPipeline


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
    state: PartialState | None = None,
    progress: bool = False,
    use_chat_template: bool = True,
    skip: Callable[[str], None] | None = None,
    **settings: Any,
) -> int:
    """Answers every row of a JSONL file.

    A killed run is continued by the same call, with any batch size and number of processes.
    While it runs, no other run writes to `output`.

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
        gen_length: tokens to generate in each row; default, as in the pipeline.
        num_inference_steps: the most backbone passes for a row; default, as in the pipeline.
        state: accelerate's, when there are several processes; they need one file system.
        progress: whether the main process shows a bar of its rows.
        use_chat_template: as in the pipeline.
        skip: is told, in a sentence, of each bad row of this process; these rows are left out of
            `output`. Without it a bad row is an error, before any row is answered.
        **settings: arguments of the pipeline's call (`block_length`, `infill`, `sampling`, ...).

    Returns:
        The number of rows that this process answered now.

    Raises:
        ValueError: a line is no JSON object, has no prompt, has `output_column` already or a column
            `gen_length`, `num_inference_steps` or `seed` that is no integer, or a prompt cannot be
            decoded; no row is left; `batch_size` or `seed` is out of range; `output` was begun by a
            run of another input, model or setting; or the input is changed while it is answered.
        OSError: a file cannot be read or written, `output` exists and is of no such run, or another
            run is writing it.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if pipeline.tokenizer is None:
        raise ValueError("`pipeline` needs a tokenizer for the texts of `source`.")
    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    rows = JSONLRows.read(Path(source), prompt_column, output_column)
    if seed not in SEEDS or seed + len(rows) not in SEEDS:
        raise ValueError(
            f"`seed` must be from -2**63 to 2**64 - 1 in each row, which gets `seed` plus its "
            f"number, got {seed} for {len(rows)} rows."
        )
    draws = {name: settings[name] for name in SETTINGS if name in settings}
    pipeline.scheduler.draw_settings(**draws).check_vocabulary(pipeline.model.config.vocab_size)
    lengths = {"gen_length": gen_length, "num_inference_steps": num_inference_steps}
    run = {
        "input_sha256": rows.sha256,
        "num_rows": len(rows),
        "prompt_column": rows.prompt_column,
        "output_column": output_column,
        "seed": seed,
        "model": pipeline.model.config._name_or_path,
        "model_digest": _model_digest(pipeline),
        "use_chat_template": use_chat_template,
        **settings,
        **pipeline.said_of_task(**lengths, **settings),
        "scheduler": {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
    }
    files = RunFiles(Path(output), run)
    if files.is_complete():
        return 0
    if rows.bad and skip is None:
        raise ValueError(next(iter(rows.bad.values())))
    own, bad = range(index, len(rows), count), set()
    for row in own:
        said = rows.bad.get(row) or _fault(
            pipeline, rows, row, use_chat_template, lengths | settings
        )
        if said is None:
            continue
        if skip is None:
            raise ValueError(said)
        skip(said)
        bad.add(row)
    if len(bad) == len(rows):
        raise ValueError(f"`source` {str(source)!r} has no row that can be answered.")
    if state is not None:
        # Nothing is begun, and no process may be done already, before all have looked.
        state.wait_for_everyone()
    with locked(files.lock, f"`output` {str(output)!r}", state):
        complete = files.is_complete()
        if index == 0 and not complete:
            files.begin()
        if state is not None:
            state.wait_for_everyone()
        if complete:
            return 0
        files.check_same()
        done = files.answers()
        left = [row for row in own if row not in done and row not in bad]
        with (
            files.part(index) as part,
            tqdm(total=len(left), unit="row", disable=not (progress and index == 0)) as bar,
        ):
            part.append((row, None) for row in sorted(bad) if row not in done)
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                values = [rows.values(row) for row in batch]
                seeds = [v.get("seed", seed + row) for v, row in zip(values, batch, strict=True)]
                texts = pipeline(
                    [v[rows.prompt_column] for v in values],
                    use_chat_template=use_chat_template,
                    generator=[torch.Generator().manual_seed(s) for s in seeds],
                    **{
                        name: [v.get(name, usual) for v in values]
                        for name, usual in lengths.items()
                    },
                    **settings,
                ).texts
                part.append(zip(batch, texts, strict=True))
                bar.update(len(batch))
        files.finish(rows)
    return len(left)


def _model_digest(pipeline: CoDDPipeline) -> str:
    """Of all that an answer depends on beside the call: weights, settings, tokenizer."""
    settings = json.loads(
        json.dumps(pipeline.model.config.to_dict(), sort_keys=True, default=str),
        object_hook=lambda config: {k: v for k, v in config.items() if k not in PASSING},
    )
    tokenizer = pipeline.tokenizer
    parts = [
        weights_fingerprint(pipeline.model),
        settings,
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _fault(
    pipeline: CoDDPipeline,
    rows: JSONLRows,
    row: int,
    use_chat_template: bool,
    call: dict[str, Any],
) -> str | None:
    """What is wrong with a row that cannot be decoded, before hours have been spent on others.

    Args:
        pipeline: with a tokenizer.
        rows: the file.
        row: which one.
        use_chat_template: as in the pipeline.
        call: other arguments of the pipeline.
    """
    model, values = pipeline.model, rows.values(row)
    own = {name: values[name] for name in ("gen_length", "num_inference_steps") if name in values}
    try:
        said = pipeline.said_of_task(**call | own)
        ids, mask = encode_prompts(
            [values[rows.prompt_column]],
            None,
            None,
            None,
            tokenizer=pipeline.tokenizer,
            model=pipeline.model,
            use_chat_template=use_chat_template,
            add_generation_prompt=True,
            chat_template_kwargs={},
            infill=call.get("infill", False),
        )
        head = model.head_of_call(call.get("head"))
        task = task_of_call(said, model, ids.shape[1])
        given = {f.name: task[f.name] for f in fields(DecodingArguments) if f.name in task}
        arguments = DecodingArguments.check(
            pipeline.scheduler, model.config, 1, settings={}, **given
        )
        lay_out(model.config, ids, mask, [], 0, arguments, head.window_length, model.max_positions)
    except ValueError as error:
        return f"{rows.where(row)}: {error}"
    return None
