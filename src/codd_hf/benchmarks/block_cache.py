"""A long answer of a block-causal backbone of 20 million parameters, with and without its cache.

The weights are random, since only time is asked for. `LLaDA2Pipeline`, which keeps nothing, drives
the same backbone for the same number of passes, and finds the same tokens. A block takes a single
pass, in which a cache saves least: the block before, complete by then, is read once more with it.
"""

from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..modeling_codd import CoDDModel
from ..pipelines import CoDDPipeline
from ..runtime.report import Report
from ..schedulers.scheduling_codd import CoDDScheduler
from . import Options
from .end_to_end import BLOCK, FACTORIZED, KEPT, STOCK, compared, sides_of

VOCABULARY = 4096


def measure(options: Options) -> Report:
    """`codd-hf bench block-cache`: a row for each batch size and pipeline."""
    length, layers = (96, 1) if options.quick else (1024, 8)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=6,
    )
    torch.manual_seed(options.seed)
    backbone: Any = LlamaForCausalLM(config)
    backbone.to(options.device)
    mask = VOCABULARY - 1
    backbone.lm_head.register_forward_hook(  # the stock pipeline does not rule the mask token out
        lambda module, args, logits: logits.index_fill(-1, logits.new_tensor([mask]).long(), -1e9)
    )
    model = CoDDModel.from_backbone(backbone, mask_token_id=mask, block_length=BLOCK)
    pipeline, rows = CoDDPipeline(model, CoDDScheduler()), list[dict[str, Any]]()
    for batch in options.batches_or(1):
        prompts = torch.randint(mask, (batch, 2 * BLOCK), device=options.device)
        both = sides_of(pipeline, model, prompts, length, length // BLOCK, BLOCK)
        sides = {name: both[name] for name in (STOCK, FACTORIZED)}
        sides |= {KEPT: partial(both[FACTORIZED], cache=None)}
        rows += [{"batch": batch} | row for row in compared(sides, batch * length, options)]
    facts = {
        "parameters": backbone.num_parameters(),
        "prompt": 2 * BLOCK,
        "generated": length,
        "block": BLOCK,
        "passes a block": 1,
        "repeats": options.repeats,
    }
    return Report(facts, {"rows": rows})
