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
from ..pipelines.pipeline_codd import CoDDPipeline
from ..schedulers.scheduling_codd import CoDDScheduler


def save_held_out(folder: Path, validation: Sequence[Example], test: Sequence[Example]) -> None:
    """Writes `validation.jsonl`, `test.jsonl` and, with ten rows of the latter, `demo.jsonl`."""
    demo = (test or validation)[:10]
    for name, part in (("validation", validation), ("test", test), ("demo", demo)):
        chat = name != "demo" and any(example.history for example in part)
        rows = [f"{json.dumps(_row(example, chat))}\n" for example in part]
        (folder / f"{name}.jsonl").write_text("".join(rows))


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
    CoDDPipeline(model, CoDDScheduler(), tokenizer).save_pretrained(folder)
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
