"""Tokens per second of the whole pipeline against diffusers' `LLaDA2Pipeline`.

Both drive the embedded model's backbone greedily for the same number of passes. The stock pipeline
cuts the canvas after the block at hand. With a single block, or under block-causal attention, both
read the same canvas and find the same tokens; with shorter blocks, which the caches need, ours
reads more under full attention. The answers with each cache to held-out questions are judged by
the share of tokens as without one and by log-likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from ..data.canvases import load_examples, tokenize_examples
from ..hub.defaults import default_model
from ..modeling_codd import CoDDModel
from ..pipelines import CoDDPipeline
from ..schedulers import CoDDScheduler
from . import Options, Report
from .timing import median_seconds

ALWAYS_TOP_K = 2.0
"""A threshold above any probability: the stock scheduler then commits by count alone."""

BLOCK = 32
STOCK, FACTORIZED = "LLaDA2Pipeline", "CoDDPipeline, factorized"
CACHES = {None: FACTORIZED, "prefix": "with prefix cache", "dual": "with dual cache"}
BLOCK_CAUSAL = ", block-causal"

Run = Callable[[], torch.Tensor]
"""Generates `[batch, length]` tokens."""


def bare_pipeline(model: CoDDModel, attention_block: int | None = None) -> CoDDPipeline:
    """A model's backbone without a head; with block-causal attention in blocks of a length."""
    backbone = model.backbone
    if attention_block is not None:
        backbone = deepcopy(backbone)
        backbone.config.block_length = attention_block
    never = {name: getattr(model.config, name) for name in ("mask_token_id", "forbidden_token_ids")}
    bare = CoDDModel.from_backbone(backbone, **never)
    pipeline = CoDDPipeline(bare, CoDDScheduler(sampling="factorized"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(
    pipeline: CoDDPipeline, prompts: torch.Tensor, length: int, steps: int, block: int
) -> dict[str, Run]:
    """Each side's way to generate tokens in `steps` passes and blocks of `block`."""
    # The stock blocks are counted from the beginning: a single one holds the prompt as well.
    stock_block = block if block < length else prompts.shape[1] + length

    def stock(model: CoDDModel) -> Run:
        side = LLaDA2Pipeline(model, BlockRefinementScheduler())
        side.set_progress_bar_config(disable=True)
        call = {
            "input_ids": prompts,
            "gen_length": length,
            "block_length": stock_block,
            "num_inference_steps": steps * stock_block // length,  # of a block
            "threshold": ALWAYS_TOP_K,
            "editing_threshold": None,
            "eos_early_stop": False,
            "mask_token_id": pipeline.model.mask_token_id,
            "output_type": "seq",
        }
        return lambda: side(**call).sequences

    def ours(side: CoDDPipeline, cache: str | None = None) -> Run:
        call = {
            "input_ids": prompts,
            "gen_length": length,
            "block_length": block,
            "num_inference_steps": steps,
            "eos_token_id": [],
            "cache": cache,
            "output_type": "seq",
        }
        return lambda: side(**call, generator=torch.Generator().manual_seed(0)).sequences

    bare = bare_pipeline(pipeline.model)
    sides = {STOCK: stock(pipeline.model.backbone), FACTORIZED: ours(bare)}
    sides["CoDDPipeline, with the head"] = ours(pipeline)
    if block < length:
        sides |= {name: ours(bare, cache) for cache, name in CACHES.items()}
        causal = bare_pipeline(pipeline.model, block)
        sides[STOCK + BLOCK_CAUSAL] = stock(causal.model)
        sides["CoDDPipeline" + BLOCK_CAUSAL] = ours(causal)
    return sides


def cache_quality(
    pipeline: CoDDPipeline, questions: list[list[int]], length: int, steps: int
) -> dict[str, dict[str, float]]:
    """The answers to questions with each cache, by pipeline name."""
    bare, figures, plain = bare_pipeline(pipeline.model), {}, None
    for cache, name in CACHES.items():
        tokens = bare(
            input_ids=questions,
            gen_length=length,
            block_length=BLOCK,
            num_inference_steps=steps,
            min_new_tokens=length,
            eos_token_id=pipeline.tokenizer.eos_token_id,
            cache=cache,
            output_type="seq",
        ).sequences
        plain = tokens if plain is None else plain
        scored = bare.model.score(questions, tokens.tolist())
        figures[name] = {
            "same tokens, %": 100 * (tokens == plain).float().mean().item(),
            "nats/token": -float(scored.factorized.sum() / scored.num_tokens.sum()),
        }
    return figures


def end_to_end(options: Options) -> Report:
    """`codd-hf bench end-to-end`: tokens per second, per batch size and length of the blocks."""
    length, steps, questions = (64, 4, 2) if options.quick else (256, 64, 40)
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    model, tokenizer, config = pipeline.model, pipeline.tokenizer, pipeline.model.config
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))
    tokenized = tokenize_examples(examples, tokenizer, max_length=None)
    asked = [example.prompt_ids for example in tokenized[:questions]]
    quality = cache_quality(pipeline, asked, length // 2, steps // 2)

    # Whoever runs the backbone, these get no probability.
    ids = [tokenizer.eos_token_id, config.mask_token_id, *config.forbidden_token_ids]
    never = torch.tensor(ids, device=model.device)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, never, -torch.inf)
    )
    text = torch.tensor([token for e in tokenized for token in e.prompt_ids + e.answer_ids])
    rows: list[dict[str, Any]] = []
    for batch in options.batches_or(1, 4):
        generator = torch.Generator().manual_seed(options.seed)
        first = torch.randint(len(text) - 2 * BLOCK, (batch, 1), generator=generator)
        prompts = text[first + torch.arange(2 * BLOCK)].to(options.device)
        for block in (length, BLOCK):
            sides = generators(pipeline, prompts, length, steps, block)
            found = {name: run() for name, run in sides.items()}
            seconds = median_seconds(sides, options.repeats, options.device, warmups=0)
            for name, tokens in found.items():
                stock = STOCK + BLOCK_CAUSAL * name.endswith(BLOCK_CAUSAL)
                same = 100 * (tokens == found[stock]).float().mean().item()
                row = {
                    "batch": batch,
                    "block": block,
                    "pipeline": name,
                    "tokens/s": batch * length / seconds[name],
                    "over LLaDA2Pipeline": seconds[stock] / seconds[name],
                    "over no cache": seconds[FACTORIZED] / seconds[name],
                    "tokens as LLaDA2Pipeline's, %": same,
                }
                rows.append(row | (quality.get(name, {}) if block < length else {}))
    facts = {
        "backbone": "the embedded model's",
        "prompt": 2 * BLOCK,
        "generated": length,
        "passes": steps,
        "repeats": options.repeats,
        "questions": questions,
    }
    return Report(facts, {"rows": rows})
