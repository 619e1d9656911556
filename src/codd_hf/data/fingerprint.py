"""What made cached evidence or a fit: enough to know whether it may stand for a new one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .. import __version__
from ..modeling_codd import CoDDModel
from ..training.processes.sharding import whole
from ..training.settings import EvidenceConfig
from .canvases import TokenizedExample

FORMAT_VERSION = 1
NAMES_ONLY = ("model", "model_revision")
"""Said in messages and not compared: a backbone is its weights, whatever folder they came from."""
PASSING = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Settings of a backbone that do not change what it predicts from the same weights."""


def model_fingerprint(model: CoDDModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a backbone and its tokenizer are, as JSON values; the head is no part of it.

    All weights are read. Of a sharded backbone all processes call it together.
    """
    backbone = model.config.text_config
    return {
        "model": backbone._name_or_path,
        "model_revision": getattr(backbone, "_commit_hash", None),
        "model_settings": settings_fingerprint(backbone),
        "model_weights": weights_fingerprint(model.backbone),
        **tokenizer_fingerprint(tokenizer),
        "mask_token_id": model.config.mask_token_id,
        "forbidden_token_ids": sorted(model.config.forbidden_token_ids or []),
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A tokenizer's vocabulary and its own tokens; how it cuts is told by the data's tokens."""
    return {
        "tokenizer": json_fingerprint(sorted(tokenizer.get_vocab().items())),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def settings_fingerprint(config: PreTrainedConfig) -> str:
    """A digest of the settings of a backbone on which its predictions depend."""
    settings = {k: v for k, v in config.to_dict().items() if k not in PASSING}
    return json_fingerprint(json.loads(json.dumps(settings, default=str)))


def fit_identity(
    made_by: dict[str, Any],
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
) -> dict[str, Any]:
    """What a fit depends on beside its settings, as `check_same_run` compares it.

    Args:
        made_by: of the backbone, from `model_fingerprint`.
        train: what is learnt.
        validation: what it is measured on.
    """
    compared = {name: value for name, value in made_by.items() if name not in NAMES_ONLY}
    data = {"data": data_fingerprint(train), "validation_data": data_fingerprint(validation)}
    return data | compared


def evidence_fingerprint(
    model: CoDDModel,
    made_by: dict[str, Any],
    examples: Sequence[TokenizedExample],
    config: EvidenceConfig,
) -> dict[str, Any]:
    """All that the evidence of `model` about `examples` depends on, as JSON values.

    Args:
        model: the backbone with the head to fit.
        made_by: of the backbone, from `model_fingerprint`.
        examples: the text.
        config: which windows and noise, and what is kept.
    """
    head = model.coupling_head
    maps = None if head is None else head.context_maps
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        **made_by,
        "data": data_fingerprint(examples),
        "num_examples": len(examples),
        "window_length": model.window_length,
        "hidden_states": maps is not None,
        "copy_length": head.config.copy_length if maps is not None and maps.copies else 0,
        **asdict(config),
        "top_k": min(config.top_k, model.config.vocab_size),
    }


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A digest of a module's parameters and buffers: names, types, shapes and bytes.

    Of a sharded module it is that of the whole one, and all processes call it together.
    """

    def parts() -> Iterable[bytes]:
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield (
                whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )

    return _digest(parts())


def data_fingerprint(examples: Sequence[TokenizedExample]) -> str:
    """A digest of the examples' tokens, in order."""
    return _digest(
        np.array([*e.prompt_ids, -1, *e.answer_ids, -2], dtype=np.int64).data for e in examples
    )


def json_fingerprint(value: Any) -> str:
    """A digest of a value that JSON has."""
    return _digest([json.dumps(value, sort_keys=True).encode()])


def tensor_fingerprint(tensor: torch.Tensor) -> str:
    """A digest of a tensor's shape and bytes."""
    kept = tensor.detach().cpu().contiguous()
    return _digest([str(tuple(kept.shape)).encode(), kept.view(-1).view(torch.uint8).numpy().data])


def check_fingerprint(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuses evidence that something else made.

    Raises:
        ValueError: a field differs; the message names it.
    """
    for name, value in ours.items():
        if name in NAMES_ONLY or theirs.get(name) == value:
            continue
        models = ""
        if name.startswith("model"):
            models = f" (of {theirs.get('model')!r} there, of {ours['model']!r} here)"
        raise ValueError(
            f"The evidence in {str(folder)!r} was made with another `{name}`: {theirs.get(name)!r} "
            f"instead of {value!r}{models}. Give another `evidence_dir`, or delete this one."
        )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
