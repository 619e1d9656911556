"""Each family of diffusion language models on a tiny random model, decoded with a new head.

The configurations are written as the families publish them: what they become here, how the
attention sees, and by which rule the model decodes, is printed with the tokens of one answer.

    python examples/families.py sdar
    python examples/families.py            # all of them
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from codd_hf import CoDDHeadConfig, CoDDModel
from codd_hf.backbones import LAYOUTS, block_length_of, decoding_of, shifts_logits

VOCABULARY, MASK = 40, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OLMO = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 128,
    "init_std": 0.3,
}
LLADA_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": 16,
    "dense_intermediate_size": 48,
    "qk_layernorm": True,
}
LLADA2 = EXPERTS | {
    "num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "block_length": 8,
}
FAMILIES = {
    "llada": {"model_type": "llada", **OLMO},
    "llada-moe": {"model_type": "lladamoe", **LLADA_MOE},
    "llada2": {"model_type": "llada2_moe", **LLADA2},
    "llada2.1": {"model_type": "llada2_moe", **LLADA2},
    "dream": {"model_type": "Dream"},
    "dreamreasoner": {"model_type": "Dream", "block_size": 8},
    "sdar": {"model_type": "sdar"},
    "sdar-moe": {"model_type": "sdar", **EXPERTS},
    "fast-dllm-v2": {"model_type": "Fast_dLLM_Qwen", "bd_size": 8},
    "stable-diffcoder": {"architectures": ["StableDiffcoderForCausalLM"]},
    "illada": {"architectures": ["ILLaDAForCausalLM"]},
    "a2d-qwen3": {"model_type": "a2d-qwen3"},
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "bert": {"model_type": "bert"},
}

REPOSITORIES = {"llada2.1": "inclusionAI/LLaDA2.1-mini"}
"""Names that say what no configuration does: those of LLaDA2.0 and 2.1 are alike."""


def tiny_model(name: str) -> CoDDModel:
    """A random model of a family, with a new head, which changes nothing."""
    published, repository = SIZES | FAMILIES[name], REPOSITORIES.get(name, "")
    layout = next((layout for layout in LAYOUTS if layout.reads(published)), None)
    config = (
        AutoConfig.for_model(**published)
        if layout is None
        else layout.translate(published, repository)
    )
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    head = CoDDHeadConfig(vocab_size=VOCABULARY, num_latents=8, mask_token_id=MASK)
    return CoDDModel.from_backbone(auto.from_config(config), head)


def main(names: Sequence[str] = (), seed: int = 0) -> dict[str, list[int]]:
    """Prints a line for each family; returns the tokens that each generated."""
    answers = {}
    for name in names or FAMILIES:
        torch.manual_seed(seed)
        model = tiny_model(name)
        config, prompt = model.backbone.config, torch.tensor([[3, 4, 5, 6, 7]])
        answers[name] = model.generate(prompt, max_new_tokens=16, eos_token_id=[])[0, 5:].tolist()
        block, shift = block_length_of(config), shifts_logits(config) * ", of the next token"
        sees = "all" if block is None else f"blocks of {block}"
        rule = ", ".join(f"{k} {v}" for k, v in decoding_of(config).items()) or "the defaults"
        print(f"{name}: a {config.model_type} that sees {sees}{shift}; decodes by {rule}")
        print(f"  {answers[name]}")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    chosen = parser.parse_args().names
    if unknown := {*chosen} - FAMILIES.keys():
        parser.error(f"`names` must be of {', '.join(FAMILIES)}, got {', '.join(unknown)}.")
    main(chosen)
