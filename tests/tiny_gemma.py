"""Tiny random DiffusionGemma models."""

from __future__ import annotations

import warnings

import torch
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)

from codd_hf import CoDDHead, CoDDModel
from tiny import head_config

with warnings.catch_warnings():  # transformers' loop imports it, and torch warns of its own code
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._inductor.cudagraph_trees

TEXT = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 12,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 8,
}


def tiny_gemma(canvas_length: int = 8, **changes) -> DiffusionGemmaForBlockDiffusion:
    """A random model whose predictions are far from uniform; token 0 is padding, 1 ends texts."""
    torch.manual_seed(0)
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**(TEXT | changes)),
        vision_config=Gemma4VisionConfig(**VISION),
        canvas_length=canvas_length,
        boi_token_id=9,
        eoi_token_id=10,
        image_token_id=11,
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.model.decoder.norm.weight.fill_(80.0)  # else all tokens were about equally likely
    return model


def images(config: DiffusionGemmaConfig) -> dict[str, torch.Tensor]:
    """A prompt with one token of an image."""
    patches, size = 9, config.vision_config.patch_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[3, config.image_token_id, 4, 5]])
    place = torch.arange(patches)
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(1, patches, 3 * size * size, generator=generator),
        "image_position_ids": torch.stack((place % 3, place // 3), -1)[None],
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


WORDS = ["[PAD]", "[EOS]", "[ANY]", "San", "New", "Diego", "York"]
SAN, NEW, DIEGO, YORK = 3, 4, 5, 6


def city_gemma(coupling: str = "none", canvas_length: int = 8, **changes):
    """A model that finds four words equally likely everywhere, and whose circuit knows two cities.

    Firsts and seconds of cities take turns, as the backbone knows: even odds at each position.
    Beside it, what reads the pairs of words of tokens.
    """
    backbone = tiny_gemma(canvas_length, vocab_size=len(WORDS), **changes)
    head = CoDDHead(head_config(len(WORDS), num_latents=4, mask_token_id=None))
    words = [SAN, DIEGO, NEW, YORK]  # what each state emits
    with torch.no_grad():
        backbone.lm_head.bias = torch.nn.Parameter(torch.full((len(WORDS),), -60.0))
        backbone.lm_head.bias[words] = 0.0
        backbone.lm_head.weight.zero_()
        head.initial.copy_(torch.tensor([0.5, 0.0, 0.5, 0.0]).log())
        step = torch.tensor([[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1], [0.5, 0, 0.5, 0]])
        head.transition.copy_(step.log())
        head.emission.fill_(-torch.inf)
        head.emission[range(4), words] = 0.0

    def pairs(tokens: torch.Tensor) -> set[tuple[str, ...]]:
        return {tuple(WORDS[i] for i in pair) for pair in tokens.reshape(-1, 2).tolist()}

    return CoDDModel.from_backbone(backbone, head, coupling=coupling), pairs
