"""What made a piece of cached evidence: enough to know whether it may stand for the backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..modeling_codd import CoDDModel
from .data import TokenizedExample
from .settings import EvidenceConfig
from .sharding import whole

FORMAT_VERSION = 1
NAMES_ONLY = ("model", "model_revision")
"""Said in messages and not compared: a backbone is its weights, whatever folder they came from."""
PASSING = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Settings of a backbone that do not change what it predicts from the same weights."""


def evidence_fingerprint(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: EvidenceConfig,
) -> dict[str, Any]:
    """All that the evidence of `model` about `examples` depends on, as JSON values."""
    backbone, head = model.config.text_config, model.coupling_head
    settings = {k: v for k, v in backbone.to_dict().items() if k not in PASSING}
    maps = None if head is None else head.context_maps
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "model": backbone._name_or_path,
        "model_revision": getattr(backbone, "_commit_hash", None),
        "model_settings": _digest([json.dumps(settings, sort_keys=True, default=str).encode()]),
        "model_weights": weights_fingerprint(model.backbone),
        "tokenizer": _digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()]),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": model.config.mask_token_id,
        "forbidden_token_ids": sorted(model.config.forbidden_token_ids or []),
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


def tensor_fingerprint(tensor: torch.Tensor) -> str:
    """A digest of a tensor's shape and bytes."""
    kept = tensor.detach().cpu().contiguous()
    return _digest([str(tuple(kept.shape)).encode(), kept.view(-1).numpy().data])


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
