"""Dream (arXiv 2508.15487), Dream-Coder and DiffuCoder: a bidirectional Qwen2 with shifted logits.

Started from an autoregressive model, they go on predicting at each position the next token.
"""

from typing import Any

from transformers import Qwen2Config

from .layout import CheckpointLayout


class DreamLayout(CheckpointLayout):
    """Qwen2's names of weights; `logit_shift` says that the logits are the next token's."""

    model_type = "Dream"
    config_class = Qwen2Config
    tokenizer_class = "Qwen2Tokenizer"
    # Dream attends to everything, whatever its configuration says.
    left_out = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """The shift, which no field says."""
        return {"logit_shift": True}
