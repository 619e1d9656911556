"""Tiny checkpoints of all families, as their own code writes them: random models, renamed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

from codd_hf.backbones import LLaDALayout

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GLM_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "num_mtp_layers": 0,
}


def native(config_class, **changes) -> PreTrainedModel:
    """A random model of transformers."""
    torch.manual_seed(0)
    kind = AutoModelForMaskedLM if "Bert" in config_class.__name__ else AutoModelForCausalLM
    kind = AutoModelForMaskedLM if config_class is RobertaConfig else kind
    config = config_class(**SIZES | changes)
    return kind.from_config(config, attn_implementation="eager").eval()


def written(folder: Path, weights: dict[str, torch.Tensor], config: dict, shards: int = 1) -> Path:
    """A folder with these weights and this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, index = sorted(weights), {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i}.safetensors"
        part = {name: weights[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    return folder


def saved_as(model, folder: Path, **config) -> Path:
    """The model's weights by their native names, with another configuration."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content |= {"rope_theta": content.pop("rope_parameters")["rope_theta"]} | config
    path.write_text(json.dumps(content))
    return folder


def as_llada(model, folder: Path) -> Path:
    """The checkpoint that LLaDA's code would have written, of a Llama."""
    model.save_pretrained(folder)
    weights, config = {}, model.config
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in LLaDALayout.key_mapping.items():
            old = old.removeprefix("^").replace(r"(\d+)", r"\1").replace(r"\.", ".")
            new = re.escape(new).replace(r"\\1", r"(\d+)")
            name = re.sub(f"^{new}", old, name)
        weights[name] = tensor
    content = json.loads((FIXTURES / "llada_tiny" / "config.json").read_text()) | {
        "d_model": config.hidden_size,
        "eos_token_id": config.eos_token_id,
        "embedding_size": config.vocab_size,
        "mask_token_id": None,
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "pad_token_id": config.pad_token_id,
        "vocab_size": config.vocab_size,
    }
    return written(folder, weights, content)


def as_llada_moe(model, folder: Path) -> Path:
    """The checkpoint that LLaDA-MoE's code would have written, of a Qwen3-MoE."""
    content = json.loads((FIXTURES / "lladamoe_tiny" / "config.json").read_text())
    given = model.config.to_dict()
    content |= {name: given[name] for name in content.keys() & given.keys() & {*SIZES, *EXPERTS}}
    content |= {
        "expert_intermediate_size": given["moe_intermediate_size"],
        "dense_intermediate_size": given["intermediate_size"],
        "mask_token_id": None,
        "num_experts": model.config.num_experts,
        "moe_layer_freq": [1] * given["num_hidden_layers"],
        "norm_topk_prob": given["norm_topk_prob"],
        "rope_theta": given["rope_parameters"]["rope_theta"],
    }
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def as_llada2(model, folder: Path) -> Path:
    """The checkpoint that LLaDA2's code would have written, of a Glm4-MoE."""
    model.save_pretrained(folder)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for new, old in (
            ("model.word_embeddings.", "model.embed_tokens."),
            (".attention.dense.", ".self_attn.o_proj."),
            (".attention.query_layernorm.", ".self_attn.q_norm."),
            (".attention.key_layernorm.", ".self_attn.k_norm."),
            (".gate.expert_bias", ".gate.e_score_correction_bias"),
        ):
            name = name.replace(old, new)
        weights[name] = tensor
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[re.sub(r"self_attn\.q_proj", "attention.query_key_value", name)] = torch.cat(parts)
    content = model.config.to_dict()
    rotary = content.pop("rope_parameters")
    content |= {
        "model_type": "llada2_moe",
        "rope_theta": rotary["rope_theta"],
        "partial_rotary_factor": rotary["partial_rotary_factor"],
        "num_experts": content["n_routed_experts"],
        "num_shared_experts": content["n_shared_experts"],
    }
    return written(folder, weights, content)


def plain(model, folder: Path) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder)
    return folder


def named(**config) -> Callable:
    """Native names of weights under another configuration."""
    return lambda model, folder: saved_as(model, folder, **config)


DREAM = {"model_type": "Dream", "architectures": ["DreamModel"]}
WIDE = {"hidden_size": 48}  # where heads share the width
FAMILIES: dict[str, tuple[type, dict, Callable]] = {
    "llada": (LlamaConfig, {"head_dim": 4}, as_llada),
    "llada-moe": (Qwen3MoeConfig, EXPERTS | {"head_dim": 4}, as_llada_moe),
    "llada2": (Glm4MoeConfig, GLM_EXPERTS, as_llada2),
    "dream": (Qwen2Config, WIDE, named(**DREAM)),
    "dreamreasoner": (Qwen3Config, {}, named(**DREAM, block_size=32)),
    "sdar": (Qwen3Config, {}, named(model_type="sdar")),
    "sdar-moe": (
        Qwen3MoeConfig,
        EXPERTS,
        named(model_type="sdar", **EXPERTS, num_local_experts=None),
    ),
    "fast-dllm-v2": (Qwen2Config, WIDE, named(model_type="Fast_dLLM_Qwen", bd_size=32)),
    "stable-diffcoder": (LlamaConfig, {}, named(architectures=["StableDiffcoderForCausalLM"])),
    "illada": (LlamaConfig, {}, named(model_type="illada", architectures=["ILLaDAForCausalLM"])),
    "a2d-qwen3": (Qwen3Config, {}, named(model_type="a2d-qwen3")),
    "a2d-qwen2": (Qwen2Config, WIDE, named(model_type="a2d-qwen2")),
    "a2d-llama": (LlamaConfig, {}, named(model_type="a2d-llama")),
    "llama": (LlamaConfig, {}, plain),
    "qwen2": (Qwen2Config, WIDE, plain),
    "qwen3": (Qwen3Config, {}, plain),
    "qwen3-moe": (Qwen3MoeConfig, EXPERTS, plain),
    "glm4-moe": (Glm4MoeConfig, GLM_EXPERTS, plain),
    "mistral": (MistralConfig, {}, plain),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 16}, plain),
    "olmo2": (Olmo2Config, WIDE, plain),
    "bert": (BertConfig, {}, plain),
    "roberta": (RobertaConfig, {}, plain),
    "modernbert": (ModernBertConfig, {"head_dim": 4}, plain),
}
"""Every row of the README's table: the native class, sizes, and how its code writes it."""


def checkpoint(kind: str, folder: Path, **changes) -> Path:
    """A checkpoint of a family."""
    config_class, sizes, write = FAMILIES[kind]
    return write(native(config_class, **sizes | changes), folder)
