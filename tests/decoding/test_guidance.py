"""Classifier-free guidance: the logits of LLaDA's formula, before the circuit sees them."""

from __future__ import annotations

import pytest
import torch
from windows import read, reader_of

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone, tiny_model

PROMPTS = [[3, 4, 5], [5, 6, 7, 8, 9, 10, 3]]
MASK = 2
CALL = {
    "gen_length": 8,
    "block_length": 4,
    "num_inference_steps": 8,
    "sampling": "marginal",
    "eos_token_id": [],
    "output_type": "seq",
}


@pytest.fixture(scope="module")
def pipe():
    head = random_head(conditioning=["latent"], context_size=16)
    pipe = CoDDPipeline(CoDDModel.from_backbone(tiny_backbone(), head), CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def plain_guided_loop(model, prompt: list[int], scale: float) -> list[int]:
    """One token a step, the surest first; the two passes are run apart."""
    length, row = len(prompt), prompt + [MASK] * 8
    for start in range(length, len(row), 4):
        for _ in range(4):
            canvas = torch.tensor([row])
            given = model(canvas)
            masked = canvas.clone()
            masked[0, :length] = MASK
            without = model(masked).logits
            logits = without + (scale + 1) * (given.logits - without)
            window = slice(start, start + 4)
            tokens = canvas[:, window]
            law = model.coupling_head(
                logits[:, window],
                tokens=tokens,
                observed=tokens != MASK,
                last_hidden_state=given.last_hidden_state[:, window],
            ).marginals[0]
            sure, best = law.max(-1)
            at = int(sure.masked_fill((tokens != MASK)[0], -1).argmax())
            row[start + at] = int(best[at])
    return row[length:]


@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_guided_tokens_are_those_of_a_plain_loop(pipe, scale):
    output = pipe(input_ids=PROMPTS, guidance_scale=scale, **CALL)
    expected = [plain_guided_loop(pipe.model, prompt, scale) for prompt in PROMPTS]
    assert output.sequences.tolist() == expected
    assert output.num_passes == 8  # a pass with its guide counts once
    unguided = pipe(input_ids=PROMPTS, **CALL).sequences
    assert not torch.equal(unguided, output.sequences)


def test_scale_of_each_row_and_0_is_off(pipe):
    unguided = pipe(input_ids=PROMPTS, **CALL).sequences
    assert torch.equal(pipe(input_ids=PROMPTS, guidance_scale=0, **CALL).sequences, unguided)
    mixed = pipe(input_ids=PROMPTS, guidance_scale=[0, 3.0], **CALL).sequences
    guided = pipe(input_ids=PROMPTS, guidance_scale=3.0, **CALL).sequences
    assert torch.equal(mixed[0], unguided[0])
    assert torch.equal(mixed[1], guided[1])
    generated = pipe.model.generate(
        torch.tensor(PROMPTS[1:]),
        max_new_tokens=8,
        block_length=4,
        num_inference_steps=8,
        sampling="marginal",
        eos_token_id=[],
        guidance_scale=3.0,
    )
    assert torch.equal(generated[0, len(PROMPTS[1]) :], guided[1])


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_both_passes_go_through_the_caches(cache, shift):
    model = CoDDModel.from_backbone(tiny_backbone(logit_shift=shift), mask_token_id=MASK)
    canvas = torch.tensor([[3, 4, 5, 2, 2, 2, 2, 0], [6, 7, 8, 9, 2, 2, 2, 2]])
    mask, generated = (canvas != 0).long(), canvas == MASK
    block = generated & (torch.arange(8) < 6)
    reader = reader_of(model, canvas, mask, cache=cache, guidance_scale=[1.5, 0.5])
    given = model(canvas, mask)
    without = model(canvas.masked_fill(mask.bool() & ~generated, MASK), mask).logits
    expected = without + torch.tensor([2.5, 1.5])[:, None, None] * (given.logits - without)
    reader.begin_stage(block)
    for _ in range(2):  # nothing has changed: the second read says what the first did
        states = read(reader, canvas, range(2))
        torch.testing.assert_close(states.logits()[block], expected[block])
        at = block.nonzero(as_tuple=True)
        torch.testing.assert_close(states.logits(at), expected[at])
        hidden = states.last_hidden_state
        torch.testing.assert_close(hidden[block], given.last_hidden_state[block])


@pytest.mark.parametrize(
    ("scale", "error"),
    [(-1.0, ValueError), (float("inf"), ValueError), ([1.0], ValueError), ("high", TypeError)],
)
def test_scale_that_cannot_be_is_one_sentence_that_names_it(scale, error):
    pipe = CoDDPipeline(tiny_model(), CoDDScheduler())
    with pytest.raises(error, match="`guidance_scale`"):
        pipe(input_ids=PROMPTS, guidance_scale=scale, **CALL)
