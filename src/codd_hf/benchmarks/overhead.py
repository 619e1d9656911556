"""A head step over one forward pass of an 8-billion-parameter backbone.

The backbone is timed as one real bidirectional Llama layer of LLaDA-8B's shape, times its number of
layers, plus the output projection of the window's positions.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ..runtime.precision import computes_bf16
from ..runtime.report import Report
from . import Options, Side, median_seconds
from .head_step import HeadCase, head_cases

SEQUENCE, LAYERS = 512, 32
"""Of the backbone's pass."""


def measure(options: Options) -> Report:
    """`codd-hf bench overhead`: a row for each vocabulary size and form of evidence."""
    dtype = torch.bfloat16 if computes_bf16(options.device) else torch.float32
    rows: list[dict[str, Any]] = []
    for case in head_cases(options, 1):
        steps = case.steps()
        sides = backbone_sides(case, options, dtype) | steps
        seconds = median_seconds(sides, options.repeats, options.device)
        forward = LAYERS * seconds["layer"] + seconds["projection"]
        rows += [
            {
                **case.sizes,
                "evidence": name,
                "head step, ms": 1e3 * seconds[name],
                "backbone forward, ms": 1e3 * forward,
                "overhead, %": 100 * seconds[name] / forward,
            }
            for name in steps
        ]
    facts = {"layers": LAYERS, "sequence": SEQUENCE, "backbone dtype": str(dtype)}
    return Report(facts | {"repeats": options.repeats}, {"rows": rows})


def backbone_sides(case: HeadCase, options: Options, dtype: torch.dtype) -> dict[str, Side]:
    """A layer's pass over the sequence, and the projection of the window to the vocabulary."""
    hidden, heads, feed_forward = (32, 2, 64) if options.quick else (4096, 32, 12_288)
    config = LlamaConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=feed_forward
    )
    config._attn_implementation = "sdpa"
    batch, vocabulary, window = (case.sizes[name] for name in ("batch", "vocabulary", "window"))
    with torch.device(options.device):
        layer = LlamaDecoderLayer(config, 0).to(dtype).eval().requires_grad_(False)
        layer.self_attn.is_causal = False
        projection = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        states = torch.randn(batch, SEQUENCE, hidden, dtype=dtype)
        rotary = LlamaRotaryEmbedding(config)(states, torch.arange(SEQUENCE)[None])
    return {
        "layer": lambda: layer(states, position_embeddings=rotary),
        "projection": lambda: projection(states[:, -window:]),
    }
