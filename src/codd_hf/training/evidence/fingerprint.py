"""All that evidence and fits depend on, as digests that can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ... import __version__
from ...data.canvases import TokenizedExample
from ...data.fingerprint import (
    data_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from ...modeling_codd import CoDDModel
from ...runtime.files import atomic_write, read_json
from ..stage_settings import ConditionalConfig

FORMAT_VERSION = 2
NAMES_ONLY = ("model", "model_revision")
"""Said in messages and not compared: a backbone is its weights, whatever folder they came from."""

OF_THE_EVIDENCE = (
    "max_extra_windows",
    "mean_span_length",
    "evidence_temperature",
    "tokens_per_batch",
    "mixed_precision",
    "evidence_precision",
)


def model_fingerprint(model: CoDDModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The identity of a backbone and its tokenizer; the head is no part of it.

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


def fit_identity(
    made_by: dict[str, Any],
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
) -> dict[str, Any]:
    """The identity of a fit beside its settings.

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
    config: ConditionalConfig,
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    """All that the evidence of `model` about `examples` depends on, as JSON.

    Args:
        model: the backbone with the head to fit.
        made_by: of the backbone, from `model_fingerprint`.
        examples: the text.
        config: the windows, the noise, and what is kept.
        num_draws: how often each example is drawn.
        seed: of windows and noise.
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
        **{name: getattr(config, name) for name in OF_THE_EVIDENCE},
        "cache_size": min(config.cache_size, model.config.vocab_size),
        "num_draws": num_draws,
        "seed": seed,
    }


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What made the evidence in a folder; None where nothing says so.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "fingerprint.json"
    return read_json(path) if path.exists() else None


def write_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Writes what makes the evidence in a folder."""
    with atomic_write(folder / "fingerprint.json") as new:
        new.write_text(json.dumps(fingerprint, indent=2))


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
