"""Dream (arXiv 2508.15487), Dream-Coder and DiffuCoder: a bidirectional Qwen2 with shifted logits.

Started from an autoregressive model, they go on predicting at each position the next token; a
position's logits are therefore those of the position before it.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

from .layout import CheckpointLayout


class DreamLayout(CheckpointLayout):
    """Qwen2's names of weights; `logit_shift` says that the logits are the next token's."""

    config_class = Qwen2Config
    tokenizer_class = "Qwen2Tokenizer"
    # Dream attends to everything, whatever its configuration says of sliding windows.
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "attention_dropout",
        "tie_word_embeddings",
    )

    def reads(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "Dream"

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"logit_shift": True}
