"""SDAR and TraDo (arXiv 2510.06303): Qwen3, dense or with experts, that decodes block by block."""

import re
from typing import Any, ClassVar

from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from .layout import CheckpointLayout


class SDARLayout(CheckpointLayout):
    """Names of weights are Qwen3's; the attention is block-causal."""

    model_type = "sdar"
    config_class = Qwen3Config
    read = ("attn_implementation",)
    block_length = 4
    decoding: ClassVar = {"strategy": "threshold", "threshold": 0.9}
    tokens: ClassVar = {151936: {"mask_token_id": 151669}}
    tokenizer_class = "Qwen2Tokenizer"

    def reads(self, config: dict[str, Any]) -> bool:
        """Also the layout of SDAR-30B-A3B."""
        return config.get("model_type") in ("sdar", "sdar_moe")

    def by_name(self, repository: str) -> dict[str, Any]:
        """`SDAR-4B-Chat-b64` has blocks of 64, and the configuration of `SDAR-4B-Chat`."""
        named = re.search(r"SDAR[\w.-]*-b(\d+)(?!\w)", repository)
        return {} if named is None else {"block_length": int(named[1])}

    def native_class(self, config: dict[str, Any]) -> type[PretrainedConfig]:
        """Qwen3-MoE for a checkpoint with experts."""
        return Qwen3MoeConfig if config.get("num_experts") else Qwen3Config
