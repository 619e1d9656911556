"""Configurations with the fields that checkpoints on the Hub have: read, and what they become."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, Qwen3Config

from codd_hf import CoDDModel
from codd_hf.backbones import block_length_of, decoding_of, shifts_logits
from codd_hf.backbones.family import layout_of
from families import native, plain

QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SDAR = QWEN | {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attn_implementation": "flex_attention",
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "micro_forward": False,
    "model_type": "sdar",
    "skip_checkpoint": False,
    "use_deepep": False,
}
LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rotary_dim": 64,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "topk_group": 4,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "vocab_size": 157184,
}
DIFFCODER = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"},
    "head_dim": 128,
    "layer_norm_eps": None,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "resid_pdrop": 0.1,
    "vocab_size": 155136,
}
DREAM = QWEN | {"architectures": ["DreamModel"], "model_type": "Dream", "use_mrope": False}
FAST_DLLM = QWEN | {
    "bd_size": 32,
    "conplemenrary_mask": True,
    "layer_types": ["full_attention"] * 36,
    "model_type": "Fast_dLLM_Qwen",
}
SURE = {"strategy": "threshold"}


@pytest.mark.parametrize(
    ("config", "kind", "block", "shift", "mask", "decoding"),
    [
        (SDAR, "qwen3", 4, False, 151669, SURE | {"threshold": 0.9}),
        (SDAR | {"block_size": 32}, "qwen3", 32, False, 151669, SURE | {"threshold": 0.9}),
        (LLADA2, "glm4_moe", 32, False, 156895, SURE | {"threshold": 0.95}),
        (DIFFCODER, "llama", 4, False, 5, SURE | {"threshold": 0.95}),
        (DREAM | {"mask_token_id": 151666}, "qwen2", None, True, 151666, {}),
        (DREAM | {"block_size": 32}, "qwen3", 32, False, 151669, SURE | {"threshold": 0.9}),
        (
            FAST_DLLM | {"bd_size": 12},
            "qwen2",
            12,
            True,
            151665,
            SURE | {"threshold": 0.9, "block_length": 4},
        ),
        (FAST_DLLM, "qwen2", 32, True, 151665, SURE | {"threshold": 0.9, "block_length": 8}),
    ],
)
def test_published_configuration_is_read(config, kind, block, shift, mask, decoding):
    found = layout_of(config).translate(config)
    assert (found.model_type, block_length_of(found)) == (kind, block)
    assert (shifts_logits(found), found.mask_token_id) == (shift, mask)
    assert decoding_of(found) == decoding


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("JetLM/SDAR-4B-Chat", 4),
        ("JetLM/SDAR-4B-Chat-b64", 64),
        ("x/RCD-SDAR-8B-b32-Thinking", 32),
        ("/models-b8/SDAR-1.7B-Chat", 4),
        ("/cache/models--JetLM--SDAR-1.7B-Chat-b16/snapshots/0b1", 16),
    ],
)
def test_sdar_of_other_blocks_is_told_by_its_name_unless_a_field_tells(name, block):
    layout = layout_of(SDAR)
    assert layout.translate(SDAR, name).block_length == block
    assert layout.translate(SDAR | {"block_size": 2}, name).block_length == 2


def test_llada2_1_is_told_by_its_name_and_edits():
    layout, plain = layout_of(LLADA2), SURE | {"threshold": 0.95}
    assert decoding_of(layout.translate(LLADA2, "inclusionAI/LLaDA2.0-mini")) == plain
    found = layout.translate(LLADA2, "inclusionAI/LLaDA2.1-mini")
    assert decoding_of(found) == plain | {"editing_threshold": 0.9}


@pytest.mark.parametrize(
    ("config_class", "field", "value"),
    [
        (LlamaConfig, "layernorm_type", "layernorm"),
        (LlamaConfig, "sliding_window", 8),
        (Qwen3Config, "attn_logit_softcapping", 30.0),
    ],
)
def test_field_that_a_native_decoder_does_not_know_is_an_error(
    config_class, field, value, tmp_path
):
    folder = plain(native(config_class), tmp_path)
    CoDDModel.from_backbone(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"`{field}` is .*may change what the model computes"):
        CoDDModel.from_backbone(folder)
