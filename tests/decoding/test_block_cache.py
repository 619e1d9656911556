"""The exact cache of block-causal backbones: equal to no cache, and each block computed once."""

from __future__ import annotations

import random

import pytest
import torch

from codd_hf import CoDDModel
from codd_hf.decoding.step import CanvasReader
from tiny import SAMPLING, STRATEGIES, random_head, tiny_backbone

MASK, END = 2, 1


@pytest.fixture
def reads(monkeypatch):
    """Of each pass: its rows, the columns that it computed, and how far its logits are off."""
    inner, found = CanvasReader.read, []

    def read(reader, rows):
        states = inner(reader, rows)
        if reader.cache is None:
            return states
        canvas, end = reader.canvas, int(reader.stage.end[rows].max())
        tokens, mask = canvas.tokens[rows, :end], canvas.attention_mask[rows, :end]
        at = (canvas.open_positions() & reader.stage.within)[rows, :end].nonzero(as_tuple=True)
        whole = reader.family.states(reader.backbone, tokens, mask)
        off = (states.logits(at) - whole.logits(at)).abs().max()
        found.append((rows.tolist(), reader.cache.columns.tolist(), float(off)))
        return states

    monkeypatch.setattr(CanvasReader, "read", read)
    return found


def setup(number: int) -> tuple[CoDDModel, dict]:
    """A random model, and a random call with prompts or templates."""
    draw = random.Random(number)
    attended, kind = draw.choice([2, 3, 4, 6]), draw.choice(["llama", "qwen2"])
    changes = {
        "block_length": attended,
        "logit_shift": draw.random() < 0.4,
        "num_key_value_heads": draw.choice([1, 2]),
        "attn_implementation": draw.choice(["sdpa", "eager"]),
    }
    conditioning = {"conditioning": ["latent", "copy"], "context_size": 16, "copy_length": 8}
    head = draw.choice([None, {}, {"window_length": 6}, {"window_length": 12, **conditioning}])
    head = None if head is None else random_head(**head)
    model = CoDDModel.from_backbone(tiny_backbone(kind, **changes), head, mask_token_id=MASK)
    rows = draw.choice([1, 3])
    lengths = [draw.randint(1, 11) for _ in range(rows)]
    call = {
        "block_length": draw.choice([n for n in (1, 2, 3, 4, 6) if attended % n == 0]),
        "eos_token_id": draw.choice([[], [END], [END, 5]]),
        "strategy": draw.choice(STRATEGIES),
        "sampling": draw.choice(SAMPLING),
        "temperature": 0.9 * (number % 2),
        "threshold": 0.4,
        "num_inference_steps": 16,
    }
    ids = [[draw.randint(3, 11) for _ in range(length)] for length in lengths]
    if draw.random() < 0.25:
        call |= {"infill": True, "eos_token_id": []}
        for row in ids:
            row[draw.randrange(len(row))] = row[-1] = MASK
    else:
        call["gen_length"] = [draw.randint(3, 12) for _ in range(rows)]
    longest, left = max(lengths), draw.random() < 0.5
    padding = [[0] * (longest - length) for length in lengths]
    pairs = [(p, row) if left else (row, p) for p, row in zip(padding, ids, strict=True)]
    tokens = torch.tensor([first + second for first, second in pairs])
    return model, {"input_ids": tokens, "attention_mask": (tokens != 0).long(), **call}


@pytest.mark.parametrize("number", range(50))
def test_tokens_and_logits_are_those_without_a_cache(number, reads):
    model, call = setup(number)
    rows, runs = len(call["input_ids"]), []
    for cache in (None, False):
        generators = [torch.Generator().manual_seed(number + row) for row in range(rows)]
        runs.append(model.generate(**call, generator=generators, cache=cache))
    assert torch.equal(*runs)
    assert reads
    assert max(off for _, _, off in reads) < 1e-4


@pytest.mark.parametrize("shift", [False, True])
def test_each_block_is_computed_once_after_it_is_complete(shift, reads):
    model = CoDDModel.from_backbone(tiny_backbone("qwen2", block_length=4, logit_shift=shift))
    model.config.mask_token_id = MASK
    prompt = torch.tensor([[3, 4, 5, 6, 7, 8]])
    call = {"max_new_tokens": 10, "num_inference_steps": 10, "eos_token_id": []}
    model.generate(prompt, strategy="left_to_right", **call)
    passes = [sorted({*columns[0]}) for _, columns, _ in reads]
    block = [[*range(4 * n, 4 * n + 4)] for n in range(4)]
    filled = [[block[0] + block[1], block[1]], [block[1] + block[2]] + 3 * [block[2]]]
    if shift:  # a block's first token is read from the block before, which is complete then
        filled[1] = [block[1]] + 3 * [block[2]]
    last = [[column + 4 for column in columns] for columns in filled[1]]
    assert passes == filled[0] + filled[1] + last


def test_rows_that_end_early_are_read_no_more(reads):
    model = CoDDModel.from_backbone(tiny_backbone(block_length=4), mask_token_id=MASK)
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    call = {"max_new_tokens": 12, "num_inference_steps": 3, "eos_token_id": [END]}
    expected = model.generate(prompts, forced_tokens=[{1: END}, {}], cache=False, **call)
    found = model.generate(prompts, forced_tokens=[{1: END}, {}], **call)
    assert torch.equal(found, expected)
    assert [rows for rows, _, _ in reads] == [[0, 1], [1], [1]]


def test_what_a_caller_changes_is_read_again(reads):
    model = CoDDModel.from_backbone(tiny_backbone(block_length=4), mask_token_id=MASK)

    def change(step, timestep, state):
        state["canvas"][1, 0] = 3 + step  # in its prompt
        return state["canvas"]

    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    call = {"max_new_tokens": 8, "num_inference_steps": 4, "eos_token_id": [], "on_step": change}
    assert torch.equal(
        model.generate(prompts, **call), model.generate(prompts, cache=False, **call)
    )
    assert max(off for _, _, off in reads) < 1e-4


def test_backbone_that_cannot_keep_anything_is_read_whole_unless_it_is_asked_to(reads):
    backbone = tiny_backbone("bert", block_length=4)
    model = CoDDModel.from_backbone(backbone, mask_token_id=MASK)
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=4).shape == (1, 6)
    assert not reads
    with pytest.raises(ValueError, match="`cache` needs a decoder"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, cache="dual")


def test_a_window_spans_the_blocks_and_is_conditioned_on_the_committed_ones():
    """Windows of 8 on blocks of 2: tokens of the blocks before are observed, those after absent."""
    model = CoDDModel.from_backbone(tiny_backbone(block_length=2), random_head(window_length=8))
    inner, seen = model.window_distribution, []

    def watched(*args, **kwargs):
        distribution = inner(*args, **kwargs)
        state = 2 * distribution.present.long() + distribution.masked.long()
        seen.append("".join(".?om"[s] for s in state[0].tolist()))
        return distribution

    model.window_distribution = watched
    prompt = torch.tensor([[3, 4, 5]])
    call = {"max_new_tokens": 9, "num_inference_steps": 5, "eos_token_id": []}
    model.generate(prompt, **call)
    # The grid begins with the prompt's last block, at 2, the first window with the text, at 3.
    assert seen == [
        "m.......",
        "omm.....",
        "ooomm...",
        "ooooomm.",
        "mm......",
    ]
