"""Measure 5: what a head step adds to one forward pass of an 8-billion-parameter backbone.

The backbone is timed as one real bidirectional Llama layer of LLaDA-8B's shape, times its number
of layers, plus the output projection of the window's positions.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .head_step import (
    EVIDENCE,
    LLADA_8B,
    QUICK,
    Shape,
    head_step,
    head_step_limit,
    mean_entropy,
    random_head,
    random_window,
)
from .report import Options, Report
from .timing import Rates, measure_rates, median_seconds


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a Llama-like backbone and of the sequence that it reads."""

    hidden: int = 4096
    heads: int = 32
    feed_forward: int = 12_288
    layers: int = 32
    sequence: int = 512


CONFIDENCES = ("latent", "marginal")
LLADA_8B_BACKBONE = BackboneShape()
QUICK_BACKBONE = BackboneShape(hidden=32, heads=2, feed_forward=64, layers=2, sequence=16)


class BackbonePart(nn.Module):
    """One layer and the output projection of a backbone, with random weights."""

    def __init__(self, backbone: BackboneShape, head: Shape, options: Options, dtype: torch.dtype):
        super().__init__()
        config = LlamaConfig(
            vocab_size=head.vocab,
            hidden_size=backbone.hidden,
            num_attention_heads=backbone.heads,
            num_key_value_heads=backbone.heads,
            intermediate_size=backbone.feed_forward,
            num_hidden_layers=1,
            attn_implementation="sdpa",
        )
        config.is_causal = False
        generator = torch.Generator(options.device).manual_seed(options.seed + 2)
        with torch.device("meta"):
            self.layer = LlamaDecoderLayer(config, 0)
            self.project = nn.Linear(backbone.hidden, head.vocab, bias=False)
        self.to(dtype).to_empty(device=options.device).eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.02, generator=generator)
        self.layer.self_attn.is_causal = False
        size = (head.batch, backbone.sequence, backbone.hidden)
        self.hidden = torch.randn(size, generator=generator, device=options.device).to(dtype)
        rotary = LlamaRotaryEmbedding(config).to(options.device)
        positions = torch.arange(backbone.sequence, device=options.device)[None]
        self.rotary = rotary(self.hidden, positions)
        self.window = head.window

    @torch.no_grad()
    def run_layer(self) -> torch.Tensor:
        output = self.layer(self.hidden, position_embeddings=self.rotary)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run_projection(self) -> torch.Tensor:
        return self.project(self.hidden[:, -self.window :])


def forward_limit(backbone: BackboneShape, head: Shape, dtype: torch.dtype, rates: Rates) -> float:
    """Least seconds of a forward pass: its products, or reading the weights once."""
    d, tokens = backbone.hidden, head.batch * backbone.sequence
    layer = 4 * d * d + 3 * d * backbone.feed_forward
    flops = backbone.layers * (2 * tokens * layer + 4 * tokens * backbone.sequence * d)
    flops += 2 * head.batch * head.window * d * head.vocab
    return rates.limit(dtype.itemsize * (backbone.layers * layer + d * head.vocab), flops)


def measure(options: Options) -> Report:
    """Backbone seconds in its fastest dtype, head step seconds, and their ratio."""
    shape = QUICK if options.quick else LLADA_8B
    shape = Shape(shape.vocab, shape.latents, shape.window, options.batch_size or 1)
    backbone = QUICK_BACKBONE if options.quick else LLADA_8B_BACKBONE
    repeats = options.repeats_or(5)
    rates = measure_rates(options.device, options.quick)

    def forward_seconds(seconds: dict[str, float]) -> float:
        return backbone.layers * seconds["layer"] + seconds["projection"]

    by_dtype = {}
    for dtype in (torch.bfloat16, torch.float32):
        part = BackbonePart(backbone, shape, options, dtype)
        sides = {"layer": part.run_layer, "projection": part.run_projection}
        by_dtype[dtype] = forward_seconds(
            median_seconds(sides, min(repeats, 3), options.device, warmups=1)
        )
        del part, sides
        gc.collect()
    fastest = min(by_dtype, key=by_dtype.__getitem__)

    part = BackbonePart(backbone, shape, options, fastest)
    head, window = random_head(shape, options), random_window(shape, options)
    given = (window.logits, window.tokens, window.observed)
    steps = [(mode, confidence) for mode in EVIDENCE for confidence in CONFIDENCES]
    sides = {"layer": part.run_layer, "projection": part.run_projection}
    for mode, confidence in steps:
        sides[f"{mode}, {confidence}"] = lambda mode=mode, confidence=confidence: head_step(
            head, *given, evidence=mode, confidence=confidence
        )
    seconds = median_seconds(sides, repeats, options.device)
    forward = forward_seconds(seconds)
    backbone_rates = measure_rates(options.device, options.quick, fastest)
    least = forward_limit(backbone, shape, fastest, backbone_rates)
    listed = {mode: window.num_listed(mode) for mode in EVIDENCE}
    rows = [
        {
            "evidence": mode,
            "confidence": confidence,
            "head step, ms": 1e3 * seconds[f"{mode}, {confidence}"],
            "limit, ms": 1e3 * head_step_limit(shape, rates, listed[mode], mode),
            "backbone forward, ms": 1e3 * forward,
            "limit of the forward, ms": 1e3 * least,
            "overhead, %": 100 * seconds[f"{mode}, {confidence}"] / forward,
        }
        for mode, confidence in steps
    ]
    sizes = shape.as_dict() | vars(backbone)
    sizes |= {"backbone dtype": str(fastest).removeprefix("torch."), "head dtype": "float32"}
    sizes |= {"entropy of a prediction, nats": mean_entropy(window.logits), "repeats": repeats}
    slower = max(by_dtype, key=by_dtype.__getitem__)
    notes = [
        f"Backbone: one Llama layer ({1e3 * seconds['layer']:.1f} ms) x {backbone.layers} + the "
        f"output projection of the window ({1e3 * seconds['projection']:.1f} ms); in "
        f"{str(slower).removeprefix('torch.')} it is {by_dtype[slower] / by_dtype[fastest]:.2f} "
        "times slower.",
        "Confidence `marginal` adds the exact token marginals. The paper reports 2.6 to 12.6 %.",
    ]
    return Report("overhead", sizes, rows, backbone_rates.as_dict() | rates.as_dict(), notes)
