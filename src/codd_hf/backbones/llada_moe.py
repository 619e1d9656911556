"""LLaDA-MoE (arXiv 2509.24389), whose weights are a bidirectional Qwen3-MoE's."""

from typing import Any, ClassVar

from transformers import Qwen3MoeConfig

from .layout import CheckpointLayout


class LLaDAMoELayout(CheckpointLayout):
    """Names of weights are Qwen3-MoE's, those of sizes are not."""

    config_class = Qwen3MoeConfig
    # What the code can do and Qwen3-MoE cannot.
    only: ClassVar = {
        "clip_qkv": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
    }
    read = ("dense_intermediate_size", "expert_intermediate_size", "moe_layer_freq")
    tokens: ClassVar = {157184: {"mask_token_id": 156895}}

    def reads(self, config: dict[str, Any]) -> bool:
        """LLaDA, which shares a name of it, has no experts."""
        named = config.get("model_type") in ("llada", "lladamoe", "llada_moe")
        return named and "expert_intermediate_size" in config

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """Heads share the width; a layer of frequency 0 has no experts."""
        if not config.get("qk_layernorm"):
            raise ValueError(
                "`qk_layernorm` must be true in the configuration of a LLaDA-MoE checkpoint, got "
                f"{config.get('qk_layernorm')!r}: others cannot be loaded."
            )
        every = config.get("moe_layer_freq") or []
        frequencies = every if isinstance(every, list) else []
        return {
            "intermediate_size": config.get("dense_intermediate_size") or 0,
            "moe_intermediate_size": config["expert_intermediate_size"],
            "head_dim": config["hidden_size"] // config["num_attention_heads"],
            "num_key_value_heads": config.get("num_key_value_heads")
            or config["num_attention_heads"],
            "norm_topk_prob": bool(config.get("norm_topk_prob")),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, frequency in enumerate(frequencies) if not frequency],
        }
