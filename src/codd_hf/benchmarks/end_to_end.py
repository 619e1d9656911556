"""Measure 8: tokens per second of the whole pipeline against diffusers' `LLaDA2Pipeline`.

Both drive the embedded model's backbone for the same number of passes, greedily, committing the
same number of tokens a pass. The stock pipeline cuts the canvas after the block at hand:

- with a single block, which ends where the canvas does, both read the same;
- with shorter blocks, which the caches need, the stock pipeline's early passes are cheaper and see
  less. With full attention, as the backbone was trained, ours reads the whole canvas.
- With block-causal attention, as in the models that the stock pipeline is made for, ours cuts the
  canvas too, and both read the same again.

Where both read the same they find the same tokens. Neither may say a token that is never generated,
nor the end of the text, behind which everything is more of it.

What the caches do to the text is measured on held-out questions: the share of tokens that stay what
they are without a cache, the log-likelihood of the answers as the backbone scores them without a
cache, and the share of 3-grams that an answer has held before.
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


def text_prompts(pipeline: CoDDPipeline, batch: int, length: int, seed: int) -> torch.Tensor:
    """`[batch, length]` tokens cut from anywhere in the embedded model's held-out text."""
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))
    tokenized = tokenize_examples(examples, pipeline.tokenizer, max_length=None)
    text = torch.tensor([token for e in tokenized for token in e.prompt_ids + e.answer_ids])
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[first + torch.arange(length)]


def stock_pipeline(model: PreTrainedModel) -> LLaDA2Pipeline:
    """diffusers' pipeline on a model."""
    pipeline = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bare_pipeline(model: CoDDModel, attention_block: int | None = None) -> CoDDPipeline:
    """The model's backbone without a head, which commits the most probable tokens.

    Args:
        model: the coupled model.
        attention_block: for block-causal attention, in blocks of so many tokens.
    """
    backbone = model.backbone
    if attention_block is not None:
        backbone = deepcopy(backbone)
        backbone.config.block_length = attention_block
    bare = CoDDModel.from_backbone(
        backbone,
        mask_token_id=model.config.mask_token_id,
        forbidden_token_ids=model.config.forbidden_token_ids,
    )
    pipeline = CoDDPipeline(bare, CoDDScheduler(sampling="factorized"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(
    model: CoDDModel,
    scheduler: CoDDScheduler,
    prompts: torch.Tensor,
    length: int,
    steps: int,
    block: int,
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, what generates `[batch, length]` tokens in `steps` passes, in blocks of `block`."""
    bare = bare_pipeline(model)
    with_head = CoDDPipeline(model, scheduler)
    with_head.set_progress_bar_config(disable=True)

    def run_stock(pipeline: LLaDA2Pipeline) -> torch.Tensor:
        # Its blocks are counted from the beginning: a single one holds the prompt as well.
        stock_block = block if block < length else prompts.shape[1] + length
        return pipeline(
            input_ids=prompts,
            gen_length=length,
            block_length=stock_block,
            num_inference_steps=steps * stock_block // length,  # of a block
            threshold=ALWAYS_TOP_K,
            editing_threshold=None,
            eos_early_stop=False,
            mask_token_id=model.config.mask_token_id,
            output_type="seq",
        ).sequences

    def run_ours(pipeline: CoDDPipeline, cache: str | None) -> torch.Tensor:
        return pipeline(
            input_ids=prompts,
            gen_length=length,
            block_length=block,
            num_inference_steps=steps,
            early_stop=False,
            cache=cache,
            generator=torch.Generator().manual_seed(0),
            output_type="seq",
        ).sequences

    sides = {STOCK: partial(run_stock, stock_pipeline(model.backbone))}
    for cache, name in CACHES.items():
        if cache is None or block < length:
            sides[name] = partial(run_ours, bare, cache)
    sides["CoDDPipeline, with the head"] = partial(run_ours, with_head, None)
    if block < length:
        causal = bare_pipeline(model, block)
        sides[STOCK + BLOCK_CAUSAL] = partial(run_stock, stock_pipeline(causal.model))
        sides["CoDDPipeline" + BLOCK_CAUSAL] = partial(run_ours, causal, None)
    return sides


def rule_out(model: CoDDModel, token_ids: list[int]) -> None:
    """Makes the backbone give tokens no probability, whoever runs it."""
    ids = torch.tensor(token_ids, device=model.device)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, ids.to(logits.device), -torch.inf)
    )


def count_passes(model: CoDDModel, run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Passes of the backbone's decoder, or of a copy of it, in one run, and what it generated."""
    passes, decoder = 0, type(model.backbone.get_decoder())

    def on_pass(module, args) -> None:
        nonlocal passes
        passes += isinstance(module, decoder)

    hook = register_module_forward_pre_hook(on_pass)
    try:
        tokens = run()
    finally:
        hook.remove()
    return passes, tokens


def cache_quality(
    pipeline: CoDDPipeline, number: int, length: int, steps: int
) -> dict[str, dict[str, float]]:
    """What each cache does to the answers to `number` held-out questions, by pipeline name."""
    bare, tokenizer = bare_pipeline(pipeline.model), pipeline.tokenizer
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))[:number]
    tokenized = tokenize_examples(examples, tokenizer, max_length=None)
    prompts = [example.prompt_ids for example in tokenized]
    runs = {
        name: bare(
            input_ids=prompts,
            gen_length=length,
            block_length=BLOCK,
            num_inference_steps=steps,
            min_new_tokens=length,
            eos_token_id=tokenizer.eos_token_id,
            cache=cache,
            output_type="seq",
        ).sequences
        for cache, name in CACHES.items()
    }
    figures = {}
    for name, tokens in runs.items():
        answers = tokens.tolist()
        scored = bare.model.score(prompts, answers)
        triples = [list(zip(a, a[1:], a[2:], strict=False)) for a in answers]
        repeated = sum(len(t) - len(set(t)) for t in triples) / sum(map(len, triples))
        figures[name] = {
            "same tokens, %": 100 * (tokens == runs[FACTORIZED]).float().mean().item(),
            "nats/token": -float(scored.factorized.sum() / scored.num_tokens.sum()),
            "repeated 3-grams, %": 100 * repeated,
        }
    return figures


def measure(options: Options) -> Report:
    """Tokens per second of each pipeline, per batch size and length of the blocks."""
    length, steps, questions = (64, 4, 2) if options.quick else (256, 64, 40)
    repeats = options.repeats_or(5)
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    model = pipeline.model
    quality = cache_quality(pipeline, questions, length // 2, steps // 2)
    config = model.config
    rule_out(
        model,
        [pipeline.tokenizer.eos_token_id, config.mask_token_id, *config.forbidden_token_ids],
    )
    rows = []
    for batch in [options.batch_size] if options.batch_size else [1, 4]:
        prompts = text_prompts(pipeline, batch, 2 * BLOCK, options.seed).to(options.device)
        for block in (length, BLOCK):
            sides = generators(model, pipeline.scheduler, prompts, length, steps, block)
            counted = {name: count_passes(model, run) for name, run in sides.items()}
            seconds = median_seconds(sides, repeats, options.device, warmups=0)
            for name, (passes, tokens) in counted.items():
                stock = STOCK + BLOCK_CAUSAL * name.endswith(BLOCK_CAUSAL)
                rows.append(
                    {
                        "batch": batch,
                        "block": block,
                        "pipeline": name,
                        "passes": passes,
                        "tokens/s": batch * length / seconds[name],
                        "over LLaDA2Pipeline": seconds[stock] / seconds[name],
                        "over no cache": seconds[FACTORIZED] / seconds[name],
                        "tokens as LLaDA2Pipeline's, %": 100
                        * (tokens == counted[stock][1]).float().mean().item(),
                        **(quality.get(name, {}) if block < length else {}),
                    }
                )
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
