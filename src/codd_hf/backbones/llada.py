"""LLaDA and LLaDA-1.5 (arXiv 2502.09992), whose weights are a bidirectional Llama's.

Their code descends from OLMo's; of its many options, only those that the released models use have
a counterpart in Llama, and others are refused. LLaDA-MoE shares the model type but not the layout.
"""

from typing import Any, ClassVar

from transformers import LlamaConfig

from .layout import CheckpointLayout

BLOCK = r"^model\.transformer\.blocks\.(\d+)\."


class LLaDALayout(CheckpointLayout):
    """`model.transformer.{wte, blocks, ln_f, ff_out}` to Llama's names."""

    model_type = "llada"
    config_class = LlamaConfig
    only: ClassVar = {
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "clip_qkv": None,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rope": True,
        "scale_logits": False,
    }
    read = (
        "alibi_bias_max",
        "attention_layer_norm_with_affine",
        "embedding_size",
        "flash_attention",
        "n_layers",
        "rope_full_precision",
    )
    tokens: ClassVar = {126464: {"mask_token_id": 126336}}  # LLaDA-8B
    key_mapping: ClassVar = {
        r"^model\.transformer\.wte\.": "model.embed_tokens.",
        r"^model\.transformer\.ln_f\.": "model.norm.",
        r"^model\.transformer\.ff_out\.": "lm_head.",
        BLOCK + r"attn_norm\.": r"model.layers.\1.input_layernorm.",
        BLOCK + r"ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
        BLOCK + r"q_proj\.": r"model.layers.\1.self_attn.q_proj.",
        BLOCK + r"k_proj\.": r"model.layers.\1.self_attn.k_proj.",
        BLOCK + r"v_proj\.": r"model.layers.\1.self_attn.v_proj.",
        BLOCK + r"attn_out\.": r"model.layers.\1.self_attn.o_proj.",
        BLOCK + r"ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
        BLOCK + r"up_proj\.": r"model.layers.\1.mlp.up_proj.",
        BLOCK + r"ff_out\.": r"model.layers.\1.mlp.down_proj.",
    }

    def reads(self, config: dict[str, Any]) -> bool:
        """LLaDA-MoE has no `d_model`."""
        return super().reads(config) and "d_model" in config

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """OLMo's names, and the defaults of LLaDA's code."""
        heads, width = config["n_heads"], config["d_model"]
        return {
            "vocab_size": config.get("embedding_size") or config["vocab_size"],
            "hidden_size": width,
            "intermediate_size": config.get("mlp_hidden_size")
            or config.get("mlp_ratio", 4) * width,
            "num_hidden_layers": config["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("n_kv_heads")
            or (1 if config.get("multi_query_attention") else heads),
            "max_position_embeddings": config["max_sequence_length"],
            "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
            "initializer_range": config.get("init_std", 0.02),
            "tie_word_embeddings": config.get("weight_tying", True),
        }
