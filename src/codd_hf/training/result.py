"""The pipeline folder that a run ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..coupling.adapters import without_adapters
from ..data.canvases import Example
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead


def save_held_out(
    folder: Path,
    validation: Sequence[Example],
    test: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes `validation.jsonl`, `test.jsonl` and, of the latter's most familiar, `demo.jsonl`."""
    demo = familiar_examples(test or validation, tokenizer)[:10]
    for name, part in (("validation", validation), ("test", test), ("demo", demo)):
        chat = name != "demo" and any(e.history for e in part)
        lines = [json.dumps(_row(example, chat)) for example in part]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _row(example: Example, chat: bool) -> dict[str, Any]:
    """An example as `load_examples` reads it."""
    if not chat:
        return {"question": example.prompt, "answer": example.answer}
    answer = {"role": "assistant", "content": example.answer}
    return {"messages": [*example.messages, answer]}


def familiar_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The examples by the share of their words that are not one token, the smallest first."""

    def share(example: Example) -> float:
        words = re.findall(r"[A-Za-z]+", f"{example.prompt} {example.answer}")
        if not words:
            return 0.0
        pieces = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        return sum(len(ids) > 1 for ids in pieces) / len(words)

    return sorted(examples, key=share)


def save_pipeline(
    folder: Path,
    model: CoDDModel,
    stage_one: CoDDHead,
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
    parts = (
        (model, without_adapters(model), folder / "model"),
        (stage_one, stage_one.state_dict(), folder / "stage1"),
    )
    for part, weights, target in parts:
        # One copy of a tensor with several names, so that tied weights are stored once.
        copies: dict[int, torch.Tensor] = {}
        stored = {
            name: copies.setdefault(
                tensor.data_ptr(), tensor.to(dtype) if tensor.is_floating_point() else tensor
            )
            for name, tensor in weights.items()
        }
        part.save_pretrained(target, state_dict=stored)
        (target / "README.md").unlink()  # a pipeline has one card, its own
