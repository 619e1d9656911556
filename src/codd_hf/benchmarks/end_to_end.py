"""Tokens per second of the whole pipeline against diffusers' `LLaDA2Pipeline`.

Both drive the embedded model's backbone greedily for the same number of passes. The stock pipeline
cuts the canvas after the block at hand. With a single block, or under block-causal attention, both
read the same canvas and find the same tokens; with shorter blocks, which the caches need, ours
reads more under full attention. The answers with each cache to held-out questions are judged by
the share of tokens as without one and by log-likelihood.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
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
from .timing import Side, median_seconds

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
    return CoDDPipeline(bare, CoDDScheduler(sampling="factorized"))


def sequences(pipeline: Any, **call: Any) -> torch.Tensor:
    """Generates `[batch, length]` tokens."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**call, output_type="seq").sequences


def sides_of(
    pipeline: CoDDPipeline, prompts: torch.Tensor, length: int, steps: int, block: int
) -> dict[str, Side]:
    """Each pipeline's way to generate tokens in `steps` passes and blocks of `block`."""
    # The stock blocks are counted from the beginning: a single one holds the prompt as well.
    stock_block = block if block < length else prompts.shape[1] + length
    call = {"input_ids": prompts, "gen_length": length}
    stock_call = call | {
        "block_length": stock_block,
        "num_inference_steps": steps * stock_block // length,  # of a block
        "threshold": ALWAYS_TOP_K,
        "editing_threshold": None,
        "eos_early_stop": False,
        "mask_token_id": pipeline.model.mask_token_id,
    }
    call |= {"block_length": block, "num_inference_steps": steps, "eos_token_id": []}

    def stock(model: torch.nn.Module) -> Side:
        return partial(sequences, LLaDA2Pipeline(model, BlockRefinementScheduler()), **stock_call)

    bare = bare_pipeline(pipeline.model)
    sides: dict[str, Side] = {
        STOCK: stock(pipeline.model.backbone),
        FACTORIZED: partial(sequences, bare, **call),
    }
    sides["CoDDPipeline, with the head"] = partial(sequences, pipeline, **call)
    if block < length:
        sides |= {name: partial(sequences, bare, cache=c, **call) for c, name in CACHES.items()}
        causal = bare_pipeline(pipeline.model, block)
        sides[STOCK + BLOCK_CAUSAL] = stock(causal.model)
        sides["CoDDPipeline" + BLOCK_CAUSAL] = partial(sequences, causal, **call)
    return sides


def cache_rows(
    pipeline: CoDDPipeline, questions: list[list[int]], length: int, steps: int
) -> list[dict[str, Any]]:
    """The answers to questions with each cache."""
    bare, rows, plain = bare_pipeline(pipeline.model), [], None
    for cache, name in CACHES.items():
        tokens = sequences(
            bare,
            input_ids=questions,
            gen_length=length,
            block_length=BLOCK,
            num_inference_steps=steps,
            min_new_tokens=length,
            eos_token_id=pipeline.tokenizer.eos_token_id,
            cache=cache,
        )
        plain = tokens if plain is None else plain
        scored: Any = bare.model.score(questions, tokens.tolist())
        same = 100 * (tokens == plain).float().mean().item()
        nats = -float(scored.factorized.sum() / scored.num_tokens.sum())
        rows.append({"pipeline": name, "same tokens, %": same, "nats/token": nats})
    return rows


def end_to_end(options: Options) -> Report:
    """`codd-hf bench end-to-end`: tokens per second, per batch size and length of the blocks."""
    length, steps, questions = (64, 4, 2) if options.quick else (256, 64, 40)
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    model, config = pipeline.model, pipeline.model.config
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))
    tokenized = tokenize_examples(examples, pipeline.tokenizer, max_length=None)
    asked = [example.prompt_ids for example in tokenized[:questions]]
    caches = cache_rows(pipeline, asked, length // 2, steps // 2)

    # Whoever runs the backbone, these get no probability.
    ends = [
        pipeline.tokenizer.eos_token_id,
        config.mask_token_id,
        *(config.forbidden_token_ids or ()),
    ]
    never = torch.tensor(ends, device=model.device)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, never, -torch.inf)
    )
    text = torch.tensor([token for e in tokenized for token in e.prompt_ids + e.answer_ids])
    rows: list[dict[str, Any]] = []
    for batch in options.batches_or(1, 4):
        prompts = text[: 2 * batch * BLOCK].view(batch, -1).to(options.device)
        for block in (length, BLOCK):
            sides = sides_of(pipeline, prompts, length, steps, block)
            found: dict[str, Any] = {name: run() for name, run in sides.items()}
            seconds = median_seconds(sides, options.repeats, options.device, warmups=0)
            for name, tokens in found.items():
                stock = STOCK + BLOCK_CAUSAL * name.endswith(BLOCK_CAUSAL)
                same = (tokens == found[stock]).float().mean().item()
                rows.append(
                    {
                        "batch": batch,
                        "block": block,
                        "pipeline": name,
                        "tokens/s": batch * length / seconds[name],
                        "over LLaDA2Pipeline": seconds[stock] / seconds[name],
                        "over no cache": seconds[FACTORIZED] / seconds[name],
                        "tokens as LLaDA2Pipeline's, %": 100 * same,
                    }
                )
    facts = {"prompt": 2 * BLOCK, "generated": length, "passes": steps}
    facts |= {"questions": questions, "repeats": options.repeats}
    return Report(facts, {"rows": rows, "caches": caches})
