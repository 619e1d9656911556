"""A head step over one forward pass of a backbone that people run.

The backbone is timed as one real layer of its shape, both ways seeing, times its number of layers,
plus the output projection of the window's positions. A pass is over a sequence, and over a block
where the attention is block-causal: what a step computes while complete blocks are kept (but for
attention to these, which the layer is spared).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, Glm4MoeConfig, LlamaConfig, Qwen3Config

from ..backbones import family_of
from ..runtime.precision import computes_bf16
from ..runtime.report import Report
from . import Options, Side, median_seconds
from .head_step import HeadCase, head_cases

SEQUENCE = 512


class Shape(NamedTuple):
    """What a backbone is made of; `block`, if its attention is block-causal."""

    config: Any
    vocabulary: int
    layers: int
    block: int | None
    sizes: dict[str, Any]


DENSE = {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32}
FEW_KEYS = {"num_key_value_heads": 8, "head_dim": 128}
EXPERTS = {
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 0,
    "use_qk_norm": True,
    "num_mtp_layers": 0,
}
SHAPES = {
    "LLaDA-8B": Shape(LlamaConfig, 126_464, 32, None, DENSE),
    "SDAR-8B": Shape(Qwen3Config, 151_936, 36, 4, DENSE | FEW_KEYS),
    "LLaDA2-mini": Shape(Glm4MoeConfig, 157_184, 20, 32, EXPERTS),
}
QUICK = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 16,
}


def measure(options: Options) -> Report:
    """`codd-hf bench overhead`: a row for each backbone, vocabulary, pass and form of evidence."""
    dtype = torch.bfloat16 if computes_bf16(options.device) else torch.float32
    rows: list[dict[str, Any]] = []
    for name in options.backbones or ["LLaDA-8B"]:
        shape = SHAPES[name]
        passes = [SEQUENCE] if shape.block is None else [SEQUENCE, shape.block]
        for case in head_cases(options, 1, vocabulary=shape.vocabulary):
            steps = case.steps()
            sides = backbone_sides(shape, case, passes, options, dtype) | steps
            seconds = median_seconds(sides, options.repeats, options.device)
            for tokens in passes:
                forward = shape.layers * seconds[f"layer, {tokens}"]
                forward += seconds[f"projection, {tokens}"]
                rows += [
                    {
                        "backbone": name,
                        **case.sizes,
                        "tokens of a pass": tokens,
                        "evidence": evidence,
                        "head step, ms": 1e3 * seconds[evidence],
                        "backbone forward, ms": 1e3 * forward,
                        "overhead, %": 100 * seconds[evidence] / forward,
                    }
                    for evidence in steps
                ]
    return Report({"backbone dtype": str(dtype), "repeats": options.repeats}, {"rows": rows})


def backbone_sides(
    shape: Shape, case: HeadCase, passes: list[int], options: Options, dtype: torch.dtype
) -> dict[str, Side]:
    """A layer's pass over some numbers of tokens, and the projection of those in a window."""
    sizes = shape.sizes
    if options.quick:
        sizes = sizes | {key: QUICK[key] for key in sizes.keys() & QUICK.keys()}
    config = shape.config(num_hidden_layers=1, vocab_size=1, pad_token_id=None, **sizes)
    family_of(config).make_bidirectional(config)
    batch, vocabulary, window = (case.sizes[size] for size in ("batch", "vocabulary", "window"))
    hidden = sizes["hidden_size"]
    with torch.device(options.device):
        layer = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        layer.requires_grad_(False)
        projection = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        states = torch.randn(batch, SEQUENCE, hidden, dtype=dtype)
    sides: dict[str, Side] = {}
    for tokens in passes:
        sides[f"layer, {tokens}"] = partial(layer, inputs_embeds=states[:, :tokens])
        sides[f"projection, {tokens}"] = partial(projection, states[:, : min(tokens, window)])
    return sides
