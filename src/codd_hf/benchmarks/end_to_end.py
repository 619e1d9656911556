"""Measure 8: tokens per second of the whole pipeline against diffusers' `LLaDA2Pipeline`.

Both drive the embedded model's backbone over the same canvas `[prompt][generated]` for the same
number of passes, greedily, committing the same number of tokens a pass. The generated part is one
block, since the stock pipeline cuts the canvas after the block at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from ..defaults import default_model
from ..modeling_codd import CoDDModel
from ..pipelines import CoDDPipeline
from ..schedulers import CoDDScheduler
from ..training.data import load_examples, tokenize_examples
from .report import Options, Report
from .timing import median_seconds

ALWAYS_TOP_K = 2.0
"""A threshold above any probability: the stock scheduler then commits by count alone."""


def text_prompts(pipeline: CoDDPipeline, batch: int, length: int, seed: int) -> torch.Tensor:
    """`[batch, length]` tokens cut from anywhere in the embedded model's held-out text."""
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))
    tokenized = tokenize_examples(examples, pipeline.tokenizer)
    text = torch.tensor([token for e in tokenized for token in e.prompt_ids + e.answer_ids])
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[first + torch.arange(length)]


def stock_pipeline(model: CoDDModel) -> LLaDA2Pipeline:
    """diffusers' pipeline on the model's backbone."""
    pipeline = LLaDA2Pipeline(model=model.backbone, scheduler=BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(
    model: CoDDModel, scheduler: CoDDScheduler, prompts: torch.Tensor, length: int, steps: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, what generates `[batch, length]` tokens in `steps` passes."""
    bare = CoDDModel.from_backbone(
        model.backbone,
        mask_token_id=model.config.mask_token_id,
        forbidden_token_ids=model.config.forbidden_token_ids,
    )
    stock = stock_pipeline(model)
    ours = {
        "CoDDPipeline, factorized": CoDDPipeline(bare, CoDDScheduler(sampling="factorized")),
        "CoDDPipeline, with the head": CoDDPipeline(model, scheduler),
    }

    def run_stock() -> torch.Tensor:
        return stock(
            input_ids=prompts,
            gen_length=length,
            block_length=length,
            num_inference_steps=steps,
            threshold=ALWAYS_TOP_K,
            editing_threshold=None,
            eos_early_stop=False,
            mask_token_id=model.config.mask_token_id,
            output_type="seq",
        ).sequences

    def run_ours(pipeline: CoDDPipeline) -> torch.Tensor:
        return pipeline(
            input_ids=prompts,
            gen_length=length,
            block_length=length,
            num_inference_steps=steps,
            early_stop=False,
            generator=torch.Generator().manual_seed(0),
            output_type="seq",
        ).sequences

    sides: dict[str, Callable[[], torch.Tensor]] = {"LLaDA2Pipeline": run_stock}
    for name, pipeline in ours.items():
        pipeline.set_progress_bar_config(disable=True)
        sides[name] = lambda pipeline=pipeline: run_ours(pipeline)
    return sides


def count_passes(model: CoDDModel, run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Passes of the backbone's decoder in one run, and what it generated."""
    passes = 0

    def on_pass(module, args, kwargs) -> None:
        nonlocal passes
        passes += 1

    hook = model.backbone.get_decoder().register_forward_pre_hook(on_pass, with_kwargs=True)
    try:
        tokens = run()
    finally:
        hook.remove()
    return passes, tokens


def measure(options: Options) -> Report:
    """Tokens per second of each pipeline, per batch size."""
    length, steps = (32, 4) if options.quick else (64, 16)
    repeats = options.repeats_or(5)
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    model = pipeline.model
    rows = []
    for batch in [options.batch_size] if options.batch_size else [1, 4]:
        prompts = text_prompts(pipeline, batch, length, options.seed).to(options.device)
        sides = generators(model, pipeline.scheduler, prompts, length, steps)
        counted = {name: count_passes(model, run) for name, run in sides.items()}
        seconds = median_seconds(sides, repeats, options.device, warmups=1)
        reference = counted["LLaDA2Pipeline"][1]
        for name, (passes, tokens) in counted.items():
            rows.append(
                {
                    "batch": batch,
                    "pipeline": name,
                    "passes": passes,
                    "tokens/s": batch * length / seconds[name],
                    "over LLaDA2Pipeline": seconds["LLaDA2Pipeline"] / seconds[name],
                    "tokens as LLaDA2Pipeline's, %": 100
                    * (tokens == reference).float().mean().item(),
                }
            )
    sizes = {
        "backbone": "the embedded model's",
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "prompt": length,
        "generated": length,
        "passes": steps,
        "repeats": repeats,
    }
    return Report("end-to-end", sizes, rows)
