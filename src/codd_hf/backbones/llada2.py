"""LLaDA2.0 and 2.1 (arXiv 2512.15745), whose weights are a block-causal Glm4-MoE's."""

from typing import Any, ClassVar

from transformers import Glm4MoeConfig
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from .layout import CheckpointLayout


class LLaDA2Layout(CheckpointLayout):
    """The names of Ling's code; queries, keys and values are projected by one matrix."""

    model_type = "llada2_moe"
    config_class = Glm4MoeConfig
    # What the code can do and Glm4-MoE cannot.
    only: ClassVar = {
        "moe_router_enable_expert_bias": True,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
    }
    read = (
        "moe_shared_expert_intermediate_size",
        "num_experts",
        "num_shared_experts",
        "partial_rotary_factor",
        "rotary_dim",
        "router_dtype",
    )
    block_length = 32
    decoding: ClassVar = {"strategy": "threshold", "threshold": 0.95}
    tokens: ClassVar = {
        157184: {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}
    }

    def by_name(self, repository: str) -> dict[str, Any]:
        """LLaDA2.1 (arXiv 2602.08676) edits, and has the configuration of LLaDA2.0."""
        return {"decoding": {"editing_threshold": 0.9}} if "LLaDA2.1" in repository else {}

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """Experts and heads by Glm4-MoE's names; without the layer that predicts further tokens."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        rotated = config.get("partial_rotary_factor", 0.5)
        if config.get("rotary_dim") not in (None, head_dim * rotated):
            raise ValueError(
                f"`rotary_dim` is {config['rotary_dim']} in the configuration of this 'llada2_moe' "
                f"checkpoint, but `partial_rotary_factor` says {head_dim * rotated}."
            )
        return {
            "n_routed_experts": config["num_experts"],
            "n_shared_experts": config["num_shared_experts"],
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "partial_rotary_factor": rotated,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "attention_bias": False,
            "num_mtp_layers": 0,
        }

    def converters(self) -> list[WeightConverter | WeightRenaming]:
        """Other names, and one matrix by rows into three."""
        return [
            WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
            WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
            WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
            WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
            WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
            WeightConverter(
                ".attention.query_key_value.weight",
                [f".self_attn.{part}_proj.weight" for part in "qkv"],
                operations=[Split(dim=0)],
            ),
        ]
