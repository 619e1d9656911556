"""A head step against one forward pass of an 8-billion-parameter backbone.

The backbone is timed as one real bidirectional Llama layer of LLaDA-8B's shape, times its number
of layers, plus the output projection of the window's positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .head_case import EVIDENCE, LLADA_8B, QUICK, HeadCase, Shape, mean_entropy
from .report import Options, Report
from .timing import RateProbes, median_seconds


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a Llama-like backbone and of the sequence that it reads."""

    hidden: int = 4096
    heads: int = 32
    feed_forward: int = 12_288
    layers: int = 32
    sequence: int = 512


DTYPES = ("bfloat16", "float32")
QUICK_BACKBONE = BackboneShape(hidden=32, heads=2, feed_forward=64, layers=2, sequence=16)


def backbone_sides(
    backbone: BackboneShape, head: Shape, options: Options, dtype: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """One `layer` and the output `projection` of a backbone with random weights."""
    config = LlamaConfig(
        vocab_size=head.vocab,
        hidden_size=backbone.hidden,
        num_attention_heads=backbone.heads,
        num_key_value_heads=backbone.heads,
        intermediate_size=backbone.feed_forward,
        attn_implementation="sdpa",
    )
    generator = torch.Generator(options.device).manual_seed(options.seed + 2)
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
        projection = nn.Linear(backbone.hidden, head.vocab, bias=False)
    layer.self_attn.is_causal = False
    for module in (layer, projection):
        module.to(getattr(torch, dtype)).to_empty(device=options.device).eval().requires_grad_(
            False
        )
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    size = (head.batch, backbone.sequence, backbone.hidden)
    hidden = torch.randn(size, generator=generator, device=options.device)
    hidden = hidden.to(getattr(torch, dtype))
    positions = torch.arange(backbone.sequence, device=options.device)[None]
    rotary = LlamaRotaryEmbedding(config).to(options.device)(hidden, positions)
    return {
        f"layer, {dtype}": lambda: layer(hidden, position_embeddings=rotary),
        f"projection, {dtype}": lambda: projection(hidden[:, -head.window :]),
    }


def measure(options: Options) -> Report:
    """Seconds of the backbone in its fastest dtype and of a head step, and their ratio."""
    shape = replace(QUICK if options.quick else LLADA_8B, batch=options.batch_size or 1)
    backbone = QUICK_BACKBONE if options.quick else BackboneShape()
    probes, case = RateProbes(options.device, options.quick), HeadCase(shape, options)
    sides = dict(probes.sides)
    for name in DTYPES:
        sides |= backbone_sides(backbone, shape, options, name)
    for mode in EVIDENCE:
        sides[mode] = partial(case.step, mode)
        sides[f"{mode}, marginals"] = partial(case.step, mode, marginals=True)
    seconds = median_seconds(sides, options.repeats_or(5), options.device)
    forwards = {
        name: backbone.layers * seconds[f"layer, {name}"] + seconds[f"projection, {name}"]
        for name in DTYPES
    }
    fastest, slower = sorted(forwards, key=forwards.__getitem__)
    rates = probes.rates(seconds)
    rows = [
        {
            "evidence": mode,
            "head step, ms": 1e3 * seconds[mode],
            "with marginals, ms": 1e3 * seconds[f"{mode}, marginals"],
            "limit, ms": 1e3 * case.limit(rates, mode),
            "backbone forward, ms": 1e3 * forwards[fastest],
            "overhead, %": 100 * seconds[mode] / forwards[fastest],
            "overhead with marginals, %": 100 * seconds[f"{mode}, marginals"] / forwards[fastest],
        }
        for mode in EVIDENCE
    ]
    sizes = shape.as_dict() | vars(backbone)
    sizes |= {"backbone dtype": fastest, "head dtype": "float32"}
    sizes |= {"entropy of a prediction, nats": mean_entropy(case.logits)}
    sizes |= {"repeats": options.repeats_or(5)}
    layer, projection = (1e3 * seconds[f"{x}, {fastest}"] for x in ("layer", "projection"))
    notes = [
        f"Backbone: one Llama layer ({layer:.1f} ms) x {backbone.layers} + the output projection "
        f"of the window ({projection:.1f} ms); in {slower} it is "
        f"{forwards[slower] / forwards[fastest]:.2f} times slower.",
        "Decoding ranks positions by the exact marginals. The paper reports 2.6 to 12.6 %.",
    ]
    return Report("overhead", sizes, rows, rates.as_dict(), notes)
