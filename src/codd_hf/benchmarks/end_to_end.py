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
from functools import partial
from pathlib import Path

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from ..data.canvases import load_examples, tokenize_examples
from ..hub.defaults import default_model
from ..modeling_codd import CoDDModel
from ..pipelines import CoDDPipeline
from ..schedulers import CoDDScheduler
from .report import Options, Report
from .timing import median_seconds

ALWAYS_TOP_K = 2.0
"""A threshold above any probability: the stock scheduler then commits by count alone."""

BLOCK = 32
STOCK, FACTORIZED = "LLaDA2Pipeline", "CoDDPipeline, factorized"
CACHES = {None: FACTORIZED, "prefix": "with prefix cache", "dual": "with dual cache"}
BLOCK_CAUSAL = ", block-causal"


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
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that generate `[batch, length]` tokens in `steps` passes and blocks of `block`."""
    mask_token_id = pipeline.model.config.mask_token_id

    def stock(model: PreTrainedModel) -> Callable[[], torch.Tensor]:
        pipeline = LLaDA2Pipeline(model, BlockRefinementScheduler())
        pipeline.set_progress_bar_config(disable=True)
        # Its blocks are counted from the beginning: a single one holds the prompt as well.
        stock_block = block if block < length else prompts.shape[1] + length
        return lambda: (
            pipeline(
                input_ids=prompts,
                gen_length=length,
                block_length=stock_block,
                num_inference_steps=steps * stock_block // length,  # of a block
                threshold=ALWAYS_TOP_K,
                editing_threshold=None,
                eos_early_stop=False,
                mask_token_id=mask_token_id,
                output_type="seq",
            ).sequences
        )

    def ours(side: CoDDPipeline, cache: str | None = None) -> Callable[[], torch.Tensor]:
        return lambda: (
            side(
                input_ids=prompts,
                gen_length=length,
                block_length=block,
                num_inference_steps=steps,
                early_stop=False,
                cache=cache,
                generator=torch.Generator().manual_seed(0),
                output_type="seq",
            ).sequences
        )

    bare = bare_pipeline(pipeline.model)
    sides = {STOCK: stock(pipeline.model.backbone), FACTORIZED: ours(bare)}
    sides["CoDDPipeline, with the head"] = ours(pipeline)
    if block < length:
        sides |= {name: ours(bare, cache) for cache, name in CACHES.items()}
        causal = bare_pipeline(pipeline.model, block)
        sides[STOCK + BLOCK_CAUSAL] = stock(causal.model)
        sides["CoDDPipeline" + BLOCK_CAUSAL] = ours(causal)
    return sides


def count_passes(decoder: type, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The tokens of one run, and the passes of the backbone's decoder in it."""
    read = []
    hook = register_module_forward_pre_hook(lambda module, args: read.append(type(module)))
    try:
        return run(), read.count(decoder)
    finally:
        hook.remove()


def cache_quality(
    pipeline: CoDDPipeline, questions: list[list[int]], length: int, steps: int
) -> dict[str, dict[str, float]]:
    """The answers to questions with each cache, by pipeline name."""
    bare = bare_pipeline(pipeline.model)
    runs = {
        name: bare(
            input_ids=questions,
            gen_length=length,
            block_length=BLOCK,
            num_inference_steps=steps,
            min_new_tokens=length,
            eos_token_id=pipeline.tokenizer.eos_token_id,
            cache=cache,
            output_type="seq",
        ).sequences
        for cache, name in CACHES.items()
    }
    figures = {}
    for name, tokens in runs.items():
        scored = bare.model.score(questions, tokens.tolist())
        figures[name] = {
            "same tokens, %": 100 * (tokens == runs[FACTORIZED]).float().mean().item(),
            "nats/token": -float(scored.factorized.sum() / scored.num_tokens.sum()),
        }
    return figures


def measure(options: Options) -> Report:
    """Tokens per second of each pipeline, per batch size and length of the blocks."""
    length, steps, questions = (64, 4, 2) if options.quick else (256, 64, 40)
    repeats = options.repeats_or(5)
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    model, tokenizer, config = pipeline.model, pipeline.tokenizer, pipeline.model.config
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))
    tokenized = tokenize_examples(examples, tokenizer, max_length=None)
    prompts = [example.prompt_ids for example in tokenized[:questions]]
    quality = cache_quality(pipeline, prompts, length // 2, steps // 2)

    # Whoever runs the backbone, these get no probability.
    never = [tokenizer.eos_token_id, config.mask_token_id, *config.forbidden_token_ids]
    never = torch.tensor(never, device=model.device)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, never, -torch.inf)
    )
    text = torch.tensor([token for e in tokenized for token in e.prompt_ids + e.answer_ids])
    rows = []
    for batch in options.batches_or(1, 4):
        generator = torch.Generator().manual_seed(options.seed)
        first = torch.randint(len(text) - 2 * BLOCK, (batch, 1), generator=generator)
        prompts = text[first + torch.arange(2 * BLOCK)].to(options.device)
        for block in (length, BLOCK):
            sides = generators(pipeline, prompts, length, steps, block)
            count = partial(count_passes, type(model.backbone.get_decoder()))
            counted = {name: count(run) for name, run in sides.items()}
            seconds = median_seconds(sides, repeats, options.device, warmups=0)
            for name, (tokens, passes) in counted.items():
                stock = STOCK + BLOCK_CAUSAL * name.endswith(BLOCK_CAUSAL)
                same = 100 * (tokens == counted[stock][0]).float().mean().item()
                row = {
                    "batch": batch,
                    "block": block,
                    "pipeline": name,
                    "passes": passes,
                    "tokens/s": batch * length / seconds[name],
                    "over LLaDA2Pipeline": seconds[stock] / seconds[name],
                    "over no cache": seconds[FACTORIZED] / seconds[name],
                    "tokens as LLaDA2Pipeline's, %": same,
                }
                rows.append(row | (quality.get(name, {}) if block < length else {}))
    sizes = {
        "backbone": "the embedded model's",
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "prompt": 2 * BLOCK,
        "generated": length,
        "passes": steps,
        "repeats": repeats,
        "questions": questions,
    }
    return Report("end-to-end", sizes, rows)
