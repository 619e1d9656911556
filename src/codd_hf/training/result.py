"""The pipeline folder that a run ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..coupling.adapters import without_adapters
from ..data.canvases import Example
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead


def save_held_out(folder: Path, validation: Sequence[Example], test: Sequence[Example]) -> None:
    """Writes `validation.jsonl`, `test.jsonl` and, with ten rows of the latter, `demo.jsonl`."""
    for name, part in (("validation", validation), ("test", test)):
        chat = any(example.history for example in part)
        _write(folder / f"{name}.jsonl", [_row(example, chat) for example in part])
    _write(folder / "demo.jsonl", [_row(example, False) for example in (test or validation)[:10]])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _row(example: Example, chat: bool) -> dict[str, Any]:
    """An example as `load_examples` reads it."""
    if not chat:
        return {"question": example.prompt, "answer": example.answer}
    answer = {"role": "assistant", "content": example.answer}
    return {"messages": [*example.messages, answer]}


def save_pipeline(
    folder: Path,
    model: CoDDModel,
    circuit: CoDDHead,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """Writes a pipeline folder with weights stored in `dtype` (computation stays in float32)."""
    from ..pipelines.pipeline_codd import CoDDPipeline
    from ..schedulers.scheduling_codd import CoDDScheduler

    if Path(model.config.text_config._name_or_path).exists():
        model.config.text_config._name_or_path = ""  # a path on this machine says nothing elsewhere
    CoDDPipeline(model=model, scheduler=CoDDScheduler(), tokenizer=tokenizer).save_pretrained(
        folder
    )
    for part, weights, target in (
        (model, without_adapters(model), folder / "model"),
        (circuit, circuit.state_dict(), folder / "stage1"),
    ):
        # One copy of a tensor with several names, so that tied weights are stored once.
        copies: dict[int, torch.Tensor] = {}
        stored = {
            name: copies.setdefault(
                tensor.data_ptr(), tensor.to(dtype) if tensor.is_floating_point() else tensor
            )
            for name, tensor in weights.items()
        }
        part.save_pretrained(target, state_dict=stored)
        (target / "README.md").unlink()  # a pipeline has one card
