"""Block-diffusion models decode by default as their own code does, here as plain loops."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from codd_hf import CoDDModel, CoDDPipeline
from codd_hf.backbones import decoding_of
from codd_hf.backbones.family import layout_of
from families import checkpoint
from tiny import random_head, tiny_backbone

MASK, THRESHOLD = 2, 0.2
SURE = {"strategy": "threshold", "threshold": THRESHOLD}


def model_of(length: int, **changes) -> CoDDModel:
    backbone = tiny_backbone("qwen2", block_length=length, **changes)
    return CoDDModel.from_backbone(backbone, mask_token_id=MASK)


def best(model, row: list[int], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probability and its token at every position of a row that is read up to `end`.

    Of a next-token predictor, what it computes at a position is moved to the next one.
    """
    logits = model.backbone_states(torch.tensor([row[:end]])).logits()[0]
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1).max(-1)


def commit(model, row: list[int], block: range, end: int) -> None:
    """A step within a block: all that is surer than the threshold, or else the surest token."""
    threshold = model.generation_config.threshold
    probs, tokens = best(model, row, end)
    left = [i for i in block if row[i] == MASK]
    sure = [i for i in left if probs[i] > threshold] or [max(left, key=lambda i: probs[i])]
    for i in sure:
        row[i] = int(tokens[i])


def sdar_and_llada2(model, prompt: list[int], new: int, length: int) -> tuple[list[int], int]:
    """Blocks in order, each in passes until it is full (arXiv 2510.06303, 2512.15745)."""
    row, passes = prompt + [MASK] * new, 0
    for begin in range(len(prompt) // length * length, len(row), length):
        block = range(begin, min(begin + length, len(row)))
        while any(row[i] == MASK for i in block):
            commit(model, row, block, block.stop)
            passes += 1
    return row, passes


def fast_dllm_v2(model, prompt: list[int], new: int, length: int, sub: int) -> tuple[list, int]:
    """Sub-blocks, and a block's first token from the complete one before (arXiv 2509.26328)."""
    row, passes = prompt + [MASK] * new, 0
    for begin in range(len(prompt) // length * length, len(row), length):
        end = min(begin + length, len(row))
        if row[begin] == MASK:
            row[begin] = int(best(model, row, begin + 1)[1][begin])
            passes += 1
        for first in range(begin, end, sub):
            while any(row[i] == MASK for i in range(first, min(first + sub, end))):
                commit(model, row, range(first, min(first + sub, end)), end)
                passes += 1
    return row, passes


def generated(model, prompt: list[int], new: int) -> tuple[list[int], int]:
    """By default; and how many passes there were."""
    steps = []
    call = {"max_new_tokens": new, "eos_token_id": [], "on_step": lambda n, *_: steps.append(n)}
    return model.generate(torch.tensor([prompt]), **call)[0].tolist(), len(steps)


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize(("prompt", "threshold"), [(3, 0.2), (3, 0.3), (8, 0.25)])
def test_sdar_and_llada2_take_what_is_sure_block_by_block(length, prompt, threshold):
    model = model_of(length, decoding=SURE | {"threshold": threshold})
    prompt = [*range(3, 3 + prompt)]
    assert generated(model, prompt, 18) == sdar_and_llada2(model, prompt, 18, length)


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "threshold"), [(3, 0.2), (3, 0.3), (8, 0.25)])
def test_fast_dllm_v2_fills_sub_blocks_after_the_next_blocks_first_token(prompt, threshold):
    said = {"strategy": "threshold", "threshold": threshold, "block_length": 2}
    model, prompt = model_of(8, logit_shift=True, decoding=said), [*range(3, 3 + prompt)]
    assert generated(model, prompt, 18) == fast_dllm_v2(model, prompt, 18, 8, 2)


def stock(model, prompt: list[int], new: int, **call) -> list[int]:
    """What diffusers' pipeline generates with blocks of 4, and no mask tokens.

    It reads a full block once more than LLaDA2.1's own code, if there is always something to edit.
    """
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    hook = model.backbone.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    )
    call |= {"num_inference_steps": 4, "block_length": 4, "eos_early_stop": False}
    call |= {"max_post_steps": 15, "mask_token_id": MASK, "gen_length": new, "output_type": "seq"}
    output = pipe(input_ids=torch.tensor([prompt]), **call)
    hook.remove()
    return prompt + output.sequences[0].tolist()


def test_stock_pipeline_decodes_alike():
    model, prompt = model_of(4, decoding=SURE), [3, 4, 5, 6]
    expected = stock(model, prompt, 16, threshold=THRESHOLD, editing_threshold=None)
    assert generated(model, prompt, 16)[0] == expected


@pytest.mark.parametrize(
    "kind", ["llada2", "dreamreasoner", "sdar", "sdar-moe", "stable-diffcoder"]
)
def test_family_decodes_alike_in_the_stock_pipeline_and_is_coupled_there(kind, tmp_path):
    folder, prompt = checkpoint(kind, tmp_path, num_hidden_layers=1), [6, 7, 8, 9, 10]
    load = partial(CoDDModel.from_backbone, folder, block_length=4)
    model, threshold = load(mask_token_id=MASK), {"threshold": 0.3}
    expected = stock(model, prompt, 11, editing_threshold=None, **threshold)
    call = {"max_new_tokens": 11, "eos_token_id": [], **threshold}
    assert model.generate(torch.tensor([prompt]), **call)[0].tolist() == expected
    coupled = load(random_head(40, mask_token_id=MASK), coupling="latent")
    found = stock(coupled, prompt, 11, editing_threshold=None, **threshold)
    assert len(found) == 16
    assert MASK not in found


@pytest.mark.parametrize(("threshold", "editing"), [(0.2, 0.18), (0.15, 0.01), (0.3, 0.2)])
@pytest.mark.parametrize("seed", range(2))
def test_llada2_1_edits_as_the_stock_pipeline_does(threshold, editing, seed):
    torch.manual_seed(seed)
    model = model_of(4, decoding=SURE | {"threshold": threshold, "editing_threshold": editing})
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    prompt = torch.randint(3, 12, (5,)).tolist()
    expected = stock(model, prompt, 15, threshold=threshold, editing_threshold=editing)
    assert generated(model, prompt, 15)[0] == expected
    model.generation_config.editing_threshold = 1
    assert generated(model, prompt, 15)[0] != expected


def test_how_a_family_decodes_is_kept_and_every_choice_of_the_user_counts_more(tmp_path):
    said = SURE | {"block_length": 2, "num_beams": 4}  # of which the last is none of its own
    tiny_backbone("qwen2", block_length=4, decoding=said, mask_token_id=MASK).save_pretrained(
        tmp_path / "backbone"
    )
    pipe = CoDDPipeline.from_pretrained(tmp_path / "backbone")
    assert pipe.scheduler.settings.strategy == "threshold"
    assert pipe.scheduler.settings.threshold == THRESHOLD
    assert pipe.task()["block_length"] == 2
    assert pipe.model.generation_config.num_beams in (None, 1)
    pipe.model.save_pretrained(tmp_path / "model")
    alone = CoDDModel.from_backbone(tmp_path / "backbone")
    alone.generation_config.editing_threshold = 0.2
    alone.save_pretrained(tmp_path / "alone")
    model, prompt = CoDDModel.from_pretrained(tmp_path / "model"), [3, 4, 5]
    assert generated(model, prompt, 9) == generated(pipe.model, prompt, 9)
    found = CoDDModel.from_pretrained(tmp_path / "alone")
    assert generated(found, prompt, 9) == generated(alone, prompt, 9) != generated(model, prompt, 9)
    assert found.generation_config.threshold == THRESHOLD
    call = {"max_new_tokens": 9, "eos_token_id": [], "block_length": 4, "num_inference_steps": 9}
    plain = CoDDModel.from_backbone(tiny_backbone("qwen2", block_length=4), mask_token_id=MASK)
    given = model.generate(torch.tensor([prompt]), strategy="low_confidence", **call)
    assert torch.equal(given, plain.generate(torch.tensor([prompt]), **call))


def test_layouts_of_known_families_say_how_they_decode():
    config = {"model_type": "Fast_dLLM_Qwen", "vocab_size": 12}
    said = decoding_of(layout_of(config).translate(config))
    assert said == {"strategy": "threshold", "threshold": 0.9, "block_length": 8}


@pytest.mark.parametrize("cache", [None, False, "dual"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_edited_rows_are_what_they_are_alone(temperature, cache):
    """Coupled, with prompts of other lengths, ends, and forced tokens, which stay."""
    backbone = tiny_backbone("qwen2", block_length=4)
    model = CoDDModel.from_backbone(backbone, random_head(window_length=8))
    forced = [{5: 7}, {}, {0: 9, 8: 10}]
    call = {"strategy": "threshold", "threshold": 0.2, "editing_threshold": 0.15, "cache": cache}
    call |= {"temperature": temperature, "eos_token_id": [1], "max_new_tokens": 11}
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 3]]
    rows = [[0] * (5 - len(prompt)) + prompt for prompt in prompts]
    draws = [torch.Generator().manual_seed(row) for row in range(3)]
    real = torch.tensor(rows) != 0
    together = model.generate(
        torch.tensor(rows), attention_mask=real, forced_tokens=forced, generator=draws, **call
    )
    assert not (together == MASK).any()
    for row, prompt in enumerate(prompts):
        draw = torch.Generator().manual_seed(row)
        alone = model.generate(
            torch.tensor([prompt]), forced_tokens=forced[row], generator=draw, **call
        )[0, len(prompt) :]
        assert together[row, 5:][: len(alone)].tolist() == alone.tolist()
        ended = 1 in alone.tolist()
        assert ended or all(alone[place] == token for place, token in forced[row].items())


def test_streams_show_edits():
    model, drafts = model_of(4, decoding=SURE | {"editing_threshold": 0.15}), []

    class Streamer:
        put = end = staticmethod(lambda *_: None)
        put_draft = staticmethod(lambda block: drafts.append(block[0].tolist()))

    model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=4, streamer=Streamer())
    full = [draft for draft in drafts if MASK not in draft]
    assert any(one != other for one, other in pairwise(full))
