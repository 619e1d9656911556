"""Training and measures meet a block-causal backbone in the states that decoding brings it into."""

from __future__ import annotations

import random

import pytest
import torch

from codd_hf import CoDDModel, CoDDScheduler
from codd_hf.coupling.windows import stretch_at, windows_over
from codd_hf.data.canvases import TokenizedExample
from codd_hf.decoding.call import DecodingCall
from codd_hf.decoding.layout import lay_out
from codd_hf.evaluation import GapSettings
from codd_hf.evaluation.gap import SEQUENTIAL, measure_gap
from codd_hf.training import DataCollatorForMaskedDiffusion, fit_backbone
from codd_hf.training.fits import pretraining
from codd_hf.training.fits.conditional import NoisedWindows
from codd_hf.training.settings import JointConfig, PretrainingConfig
from codd_hf.training.windows import NoisedCanvases
from tiny import correlated_examples, enumerate_window, random_head, tiny_backbone

MASK = 2
SETUPS = pytest.mark.parametrize(
    ("block", "window", "shift"),
    [(2, 4, False), (2, 4, True), (4, 4, False), (4, 4, True), (3, 4, False), (8, 4, False)],
)


def causal_model(block: int, window: int, shift: bool, vocab_size: int = 12, **head) -> CoDDModel:
    backbone = tiny_backbone("llama", vocab_size, block_length=block, logit_shift=shift)
    return CoDDModel.from_backbone(backbone, random_head(vocab_size, window_length=window, **head))


@SETUPS
def test_stretches_are_what_decoding_goes_through(block, window, shift):
    model = causal_model(block, window, shift)
    for size in range(1, 10):
        call = DecodingCall(model, CoDDScheduler(), 1, gen_length=13)
        ids = torch.full((1, size), 5)
        canvas = lay_out(model, call, ids, torch.ones_like(ids))
        start, end = canvas.start, canvas.start + 13
        for stage in canvas.stages:
            starts = windows_over(stage.within, canvas.window_origin, canvas.start, window)
            for place in stage.within[0].nonzero()[:, 0]:
                found = stretch_at(place, start, end, window, model.backbone.config)
                assert starts[0, found.window]
                assert found.end == min(stage.end, end)
                inside = torch.arange(int(found.begin), int(found.stop))
                assert place in inside
                assert stage.within[0, inside].all()
                assert not stage.within[0, found.stop : found.window + window].any()


@SETUPS
@pytest.mark.parametrize("conditioning", [(), ("latent", "copy")])
def test_training_hides_a_stretch_and_sees_nothing_behind_it(
    block, window, shift, conditioning, tiny_tokenizer
):
    size = len(tiny_tokenizer)
    head = {"mask_token_id": 1, "conditioning": list(conditioning), "context_size": 16}
    model = causal_model(block, window, shift, size, **head)
    examples = correlated_examples(40)
    examples += [TokenizedExample([18] * 3, example.answer_ids[:5]) for example in examples]
    canvases = NoisedCanvases(model, tiny_tokenizer, examples, JointConfig(), seed=0)
    column, seen = torch.arange(canvases.ids.shape[1]), canvases.mask.bool()
    places = canvases.starts[:, None] + torch.arange(window)
    for row, example in enumerate(examples):
        end = int(seen[row].sum())
        hidden = (column[seen[row]])[canvases.ids[row, seen[row]] == 1]
        assert torch.equal(hidden, places[row][canvases.masked[row]]) or window % block
        if len(hidden):
            begin = len(example.prompt_ids)
            found = stretch_at(
                hidden[:1],
                torch.tensor([begin]),
                torch.tensor([10**6]),
                window,
                model.backbone.config,
            )
            assert found.window == canvases.starts[row] or window % block
            assert hidden[0] >= found.begin
            assert end <= found.end
    counts = canvases.masked.sum(1)
    assert len(counts.unique()) > 1
    assert counts.max() == min(block, window) - shift * (block > 1)
    found = NoisedWindows.read(canvases, size).scores(model.coupling_head)
    with torch.no_grad():
        wanted = canvases.scores()
    assert torch.equal(found.masked, wanted.masked)
    assert torch.allclose(found.gain, wanted.gain, atol=0.1, rtol=0.02)


@torch.no_grad()
@SETUPS
def test_collator_is_told_the_blocks_and_the_loss_is_of_a_stretch(
    block, window, shift, tiny_tokenizer
):
    model = causal_model(block, window, shift, len(tiny_tokenizer), mask_token_id=1)
    config = model.backbone.config
    collate = DataCollatorForMaskedDiffusion(tiny_tokenizer, 1, window, 0, config=config)
    torch.manual_seed(0)
    for example in correlated_examples(8):
        ids = example.prompt_ids + example.answer_ids
        labels = [-100] * len(example.prompt_ids) + example.answer_ids
        batch = collate([{"input_ids": ids, "labels": labels}])
        seen, (begin, *_) = batch["attention_mask"], (batch["labels"][0] != -100).nonzero()[:, 0]
        hidden = (batch["input_ids"][0] == 1) & seen[0].bool()
        if not hidden.any():  # of the part of a block that lies in another window
            continue
        start, end = torch.tensor([len(example.prompt_ids)]), torch.tensor([ids.index(2) + window])
        place = hidden.nonzero()[0]
        found = stretch_at(place, start, end, window, config)
        assert begin == found.window or window % block
        assert seen.sum() <= found.end
        states = model.backbone_states(batch["input_ids"], seen)
        law = model.window_distribution(states, batch["input_ids"], begin[None], seen)
        places = (begin + torch.arange(window)).clamp(max=batch["labels"].shape[1] - 1)
        if law.masked.any():
            wanted = -law.log_prob(batch["labels"][:, places].clamp(min=0)) / law.masked.sum()
            assert model(**batch, coupling="latent").loss == pytest.approx(wanted.item(), abs=1e-4)


@torch.no_grad()
@SETUPS
def test_scores_are_the_enumerated_log_likelihoods_block_by_block(block, window, shift):
    model = causal_model(block, window, shift)
    draw = random.Random(0)
    prompts = [[draw.randint(3, 11) for _ in range(size)] for size in (3, 4, 1)]
    answers = [[draw.randint(3, 11) for _ in range(size)] for size in (6, 7, 3)]
    scores = model.score(prompts, answers, batch_size=2)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text, place, total = prompt + answer, len(prompt), torch.zeros(2)
        while place < len(text):
            end = min(place - place % block + block, len(text))
            if shift and place % block == 0 and place:
                end = place + 1
            origin = len(prompt) - (len(prompt) % block if window % block == 0 else 0)
            begin = max(place - (place - origin) % window, len(prompt))
            stop = min(end, begin + window)
            ids = torch.tensor([text[:place] + [MASK] * (end - place)])
            at, truth = slice(begin, stop), torch.tensor(text[place:stop])
            logits = model(ids).logits[0, at]
            values, law = enumerate_window(model.coupling_head, logits, ids[0, at], MASK)
            total[1] += law[(values[:, place - begin :] == truth).all(1)].log().item()
            log_phi = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
            total[0] += log_phi[place - begin :].gather(1, truth[:, None]).sum()
            place = stop
        assert scores.factorized[row].item() == pytest.approx(total[0].item(), abs=1e-4)
        assert scores.coupled[row].item() == pytest.approx(total[1].item(), abs=1e-4)


def test_gap_of_a_backbone_that_sees_single_tokens_is_none(tiny_tokenizer):
    settings, rows = GapSettings(ratios=[0.5, 1.0]), {}
    for block in (1, 2):
        model = causal_model(block, 4, False, len(tiny_tokenizer), mask_token_id=1)
        heads = {"head": model.coupling_head}
        found = measure_gap(model, heads, tiny_tokenizer, correlated_examples(8), settings)
        rows[block] = [row["factorized"].value - row[SEQUENTIAL].value for row in found]
    assert rows[1] == pytest.approx([0, 0], abs=1e-6)
    assert rows[2][0] == pytest.approx(0, abs=1e-6)  # one token
    assert abs(rows[2][1]) > 1e-3


def test_pretraining_hides_a_block_of_a_block_causal_backbone(tiny_tokenizer, monkeypatch):
    model, drawn = causal_model(2, 4, False, len(tiny_tokenizer), mask_token_id=1), []
    draw_canvases = pretraining.draw_canvases

    def recorded(*args, **kwargs):
        drawn.append(draw_canvases(*args, **kwargs)[1])
        return draw_canvases(*args, **kwargs)

    monkeypatch.setattr(pretraining, "draw_canvases", recorded)
    bare = CoDDModel.from_backbone(model.backbone, mask_token_id=1)
    data, config = correlated_examples(8), PretrainingConfig(max_steps=2, mixed_precision="no")
    fit_backbone(bare, tiny_tokenizer, data[:6], data[6:], config, window_length=4)
    assert {int(size) for noise in drawn for size in noise.span.sum(1)} == {1, 2}
