"""The identity of fits and of evidence: all that they depend on, as JSON that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.canvases import TokenizedExample
from ..data.fingerprint import (
    data_fingerprint,
    settings_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)

DIGESTS = {
    "data": "training data",
    "validation_data": "validation data",
    "evidence": "evidence",
    "examples": "examples",
    "tokenizer": "tokens of the tokenizer",
    "embeddings": "embeddings of the backbone",
    "model_settings": "settings of the backbone",
    "model_weights": "weights of the backbone",
    "start": "result of the stage before",
}
"""Parts of an identity that are digests, which say nothing to a reader."""


def data_identity(
    train: Sequence[TokenizedExample], validation: Sequence[TokenizedExample]
) -> dict[str, Any]:
    """Of the examples of a fit."""
    return {"data": data_fingerprint(train), "validation_data": data_fingerprint(validation)}


def backbone_identity(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int
) -> dict[str, Any]:
    """Of a backbone, all of whose weights are read; of a sharded one all processes call it."""
    return {
        "model_settings": settings_fingerprint(backbone.config),
        "model_weights": weights_fingerprint(backbone),
        "mask_token_id": mask_token_id,
        **tokenizer_fingerprint(tokenizer),
    }


def check_same(what: str, theirs: dict[str, Any], ours: dict[str, Any], remedy: str) -> None:
    """Refuses to go on with what has another identity.

    Raises:
        ValueError: it differs; the message names the part.
    """
    for name, value in ours.items():
        if theirs.get(name) != value:
            made = f"with `{name}` {theirs.get(name)!r}, not {value!r}: continue with that"
            if name in DIGESTS:
                made = f"with other {DIGESTS[name]} (`{name}`): give back those"
            raise ValueError(f"{what} made {made}, or {remedy}.")
