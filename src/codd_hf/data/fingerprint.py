"""Digests of data, tokenizers, settings and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..modeling_codd import CoDDModel
from .canvases import TokenizedExample

if TYPE_CHECKING:
    from ..pipelines.pipeline_codd import CoDDPipeline

PASSING = (
    "_name_or_path",
    "architectures",
    "decoding",
    "dtype",
    "transformers_version",
    "use_cache",
)
"""Settings of a backbone that do not change what it predicts from the same weights."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A digest of a tokenizer's vocabulary and own tokens; its cuts show in the data's tokens."""
    return {
        "tokenizer": json_fingerprint(sorted(tokenizer.get_vocab().items())),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def settings_fingerprint(config: PreTrainedConfig) -> str:
    """A digest of the settings of a backbone on which its predictions depend."""
    return json_fingerprint(
        json.loads(
            json.dumps(config.to_dict(), default=str),
            object_hook=lambda part: {k: v for k, v in part.items() if k not in PASSING},
        )
    )


def weights_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of tensors, such as a module's `state_dict()`: names, types, shapes and bytes."""

    def parts() -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return _digest(parts())


def identity_of(
    model: CoDDModel, tokenizer: PreTrainedTokenizerBase, **examples: Sequence[TokenizedExample]
) -> dict[str, Any]:
    """The digests of examples and of a backbone with all its weights."""
    return {
        **{name: data_fingerprint(part) for name, part in examples.items()},
        "model_settings": settings_fingerprint(model.backbone.config),
        "model_weights": weights_fingerprint(model.backbone.state_dict()),
        "mask_token_id": model.config.mask_token_id,
        **tokenizer_fingerprint(tokenizer),
    }


def pipeline_fingerprint(pipeline: CoDDPipeline) -> str:
    """A digest of all in a pipeline on which its texts depend."""
    model, tokenizer = pipeline.model, pipeline.tokenizer
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    spelling = [tokenizer.special_tokens_map, tokenizer.chat_template]
    parts = [weights_fingerprint(model.state_dict()), settings_fingerprint(model.config)]
    return json_fingerprint([*parts, scheduler, tokenizer_fingerprint(tokenizer), *spelling])


def data_fingerprint(examples: Sequence[TokenizedExample]) -> str:
    """A digest of the examples' tokens, in order."""
    return _digest(
        np.array([*e.prompt_ids, -1, *e.answer_ids, -2], dtype=np.int64).data for e in examples
    )


def json_fingerprint(value: Any) -> str:
    """A digest of a value that JSON has."""
    return _digest([json.dumps(value, sort_keys=True).encode()])


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
