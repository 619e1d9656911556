"""Tokens per second of the whole pipeline against diffusers' `LLaDA2Pipeline`.

Both drive the embedded model's backbone greedily for the same number of passes. The stock pipeline
cuts the canvas after the block at hand. With a single block, or under block-causal attention, both
read the same canvas and find the same tokens; with shorter blocks, which the caches need, ours
reads more under full attention.
"""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from ..data.tasks import sample_tasks
from ..hub.repositories import default_model
from ..pipelines import CoDDPipeline
from ..runtime.report import Report
from . import Options, median_seconds

ALWAYS_TOP_K = 2.0
"""A threshold above any probability: the stock scheduler then commits by count alone."""

BLOCK = 32
STOCK, FACTORIZED = "LLaDA2Pipeline", "CoDDPipeline, factorized"
KEPT = "complete blocks kept"


def measure(options: Options) -> Report:
    """`codd-hf bench end-to-end`: a row for each batch size, kind of blocks and pipeline."""
    length, steps = (64, 4) if options.quick else (256, 64)
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    model, tokenizer = pipeline.model, pipeline.tokenizer
    # Whoever runs the backbone, these get no probability.
    ends = [tokenizer.eos_token_id, model.mask_token_id, *(model.config.forbidden_token_ids or ())]
    never = torch.tensor(ends, device=model.device)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, never, -torch.inf)
    )
    causal = CoDDPipeline(deepcopy(model), pipeline.scheduler, tokenizer)
    causal.model.backbone.config.block_length = BLOCK
    questions = [task.question for task in sample_tasks("test[:300]")]
    text = tokenizer("\n".join(questions), return_tensors="pt")["input_ids"][0]
    rows: list[dict[str, Any]] = []
    for batch in options.batches_or(1, 4):
        prompts = text[: 2 * batch * BLOCK].view(batch, -1).to(options.device)
        for kind, block, ours, theirs in (
            ("single", length, pipeline, model.backbone),
            ("full", BLOCK, pipeline, model.backbone),
            ("block-causal", BLOCK, causal, causal.model),
        ):
            sides = sides_of(ours, theirs, prompts, length, steps, block)
            if kind == "full":
                sides |= {
                    f"with {cache} cache": partial(sides[FACTORIZED], cache=cache)
                    for cache in ("prefix", "dual")
                }
            if kind == "block-causal":
                sides[KEPT] = partial(sides[FACTORIZED], cache=None)
            about = {"batch": batch, "blocks": kind}
            rows += [about | row for row in compared(sides, batch * length, options)]
    facts = {"prompt": 2 * BLOCK, "generated": length, "block": BLOCK, "passes": steps}
    return Report(facts | {"repeats": options.repeats}, {"rows": rows})


def compared(
    sides: dict[str, partial[torch.Tensor]], num_tokens: int, options: Options
) -> list[dict[str, Any]]:
    """A row for each side, of so many new tokens: its speed, and over that of two of them."""
    found = {name: run() for name, run in sides.items()}
    seconds = median_seconds(sides, options.repeats, options.device, warmups=0)
    return [
        {
            "pipeline": name,
            "tokens/s": num_tokens / seconds[name],
            "over LLaDA2Pipeline": seconds[STOCK] / seconds[name],
            "over no cache": seconds[FACTORIZED] / seconds[name],
            "tokens as LLaDA2Pipeline's, %": 100 * (tokens == found[STOCK]).float().mean().item(),
        }
        for name, tokens in found.items()
    ]


def sides_of(
    pipeline: CoDDPipeline,
    stock_model: torch.nn.Module,
    prompts: torch.Tensor,
    length: int,
    steps: int,
    block: int,
) -> dict[str, partial[torch.Tensor]]:
    """Each pipeline's way to generate tokens in `steps` passes and blocks of `block`, no cache."""
    # The stock blocks are counted from the beginning: a single one holds the prompt as well.
    stock_block = block if block < length else prompts.shape[1] + length
    stock_call = {
        "block_length": stock_block,
        "num_inference_steps": steps * stock_block // length,  # of a block
        "threshold": ALWAYS_TOP_K,
        "editing_threshold": None,
        "eos_early_stop": False,
        "mask_token_id": pipeline.model.mask_token_id,
    }
    call: dict[str, Any] = {"block_length": block, "num_inference_steps": steps}
    call |= {"eos_token_id": [], "cache": False, "strategy": "low_confidence"}
    coupled = partial(_sequences, pipeline, input_ids=prompts, gen_length=length, **call)
    stock = LLaDA2Pipeline(stock_model, BlockRefinementScheduler())
    alone = {"head": False, "sampling": "factorized", "evidence_temperature": 1.0}
    return {
        STOCK: partial(_sequences, stock, input_ids=prompts, gen_length=length, **stock_call),
        FACTORIZED: partial(coupled, **alone),
        "CoDDPipeline, with the head": coupled,
    }


def _sequences(pipeline: Any, **call: Any) -> torch.Tensor:
    """Generates `[batch, length]` tokens."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**call, output_type="seq").sequences
