"""Promises of the head that `codd-hf train` makes for the backbones that people run."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from codd_hf import CoDDHead, CoDDHeadConfig
from codd_hf.backbones.family import layout_of
from codd_hf.training.run import conditioned
from codd_hf.training.settings import TrainConfig

BACKBONES = {
    "SDAR-1.7B": {
        "model_type": "sdar",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "LLaDA2-mini": {
        "model_type": "llada2_moe",
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 256,
        "num_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 1,
        "tie_word_embeddings": False,
    },
}
"""As in their published configurations."""


@pytest.mark.parametrize(
    ("name", "size", "most"), [("SDAR-1.7B", 1.7e9, 0.3), ("LLaDA2-mini", 16e9, 0.1)]
)
def test_head_is_a_small_share_of_a_backbone_with_a_large_vocabulary(name, size, most):
    config, training = layout_of(BACKBONES[name]).translate(BACKBONES[name]), TrainConfig("", "")
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
        sizes = {"vocab_size": config.vocab_size, "num_latents": training.num_latents}
        circuit = CoDDHead(CoDDHeadConfig(**sizes))
        head = CoDDHead(conditioned(training, circuit, config.hidden_size))
    number, share = head.num_parameters(), 100 * head.num_parameters() / backbone.num_parameters()
    print(f"{name}: {backbone.num_parameters():,}, head {number:,} ({share:.3f} %)")
    assert backbone.num_parameters() == pytest.approx(size, rel=0.03)
    assert head.is_tied
    assert head.evidence_size == 64
    assert share < most


def test_head_for_a_small_vocabulary_has_dense_emissions():
    training = TrainConfig("", "")
    circuit = CoDDHead(CoDDHeadConfig(vocab_size=30522, num_latents=training.num_latents))
    assert conditioned(training, circuit, 768).emission == "dense"
    assert conditioned(TrainConfig("", "", emission="tied"), circuit, 768).emission == "tied"
