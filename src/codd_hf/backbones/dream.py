"""Dream (arXiv 2508.15487), Dream-Coder, DiffuCoder: a bidirectional Qwen2 with shifted logits.

Started from an autoregressive model, they go on predicting at each position the next token.
DreamReasoner, of the same model type, does not: it is a block-causal Qwen3.
"""

from typing import Any, ClassVar

from transformers import Qwen2Config, Qwen3Config

from .layout import BLOCK_LENGTHS, WINDOW, CheckpointLayout


class DreamLayout(CheckpointLayout):
    """Qwen2's names of weights; `logit_shift` says that the logits are the next token's."""

    model_type = "Dream"
    config_class = Qwen2Config
    # Dream attends to everything, whatever its configuration says.
    left_out = WINDOW
    logit_shift = True
    tokens: ClassVar = {152064: {"mask_token_id": 151666}}
    tokenizer_class = "Qwen2Tokenizer"

    def reads(self, config: dict[str, Any]) -> bool:
        """Dream has no blocks."""
        return super().reads(config) and not config.keys() & {*BLOCK_LENGTHS}


class DreamReasonerLayout(CheckpointLayout):
    """Qwen3's names of weights."""

    model_type = "Dream"
    config_class = Qwen3Config
    block_length = 32
    decoding: ClassVar = {"strategy": "threshold", "threshold": 0.9}
    tokens: ClassVar = {151936: {"mask_token_id": 151669}}
    tokenizer_class = "Qwen2Tokenizer"

    def reads(self, config: dict[str, Any]) -> bool:
        """It has blocks."""
        return super().reads(config) and bool(config.keys() & {*BLOCK_LENGTHS})
