"""Promises of `CoDDModel.score`."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDModel
from tiny import enumerate_window, random_head, tiny_backbone, tiny_model

MASK = 2
PROMPTS = [[5, 6, 7], [9], []]
ANSWERS = [[4, 8, 3, 10, 6, 5], [7, 7, 11], [3, 4, 5, 6, 7]]


def by_enumeration(model: CoDDModel, prompt: list[int], answer: list[int], coupled: bool) -> float:
    """Sum over the windows of the log of an enumerated joint probability, one row at a time."""
    total, length = 0.0, model.window_length
    for start in range(0, len(answer), length):
        ids = torch.tensor([prompt + answer[:start] + [MASK] * (len(answer) - start)])
        at = slice(len(prompt) + start, len(prompt) + min(start + length, len(answer)))
        truth = torch.tensor(answer[start : start + length])
        logits = model(ids).logits[0, at]
        if coupled:
            values, law = enumerate_window(model.coupling_head, logits, ids[0, at], MASK)
            total += law[(values == truth).all(1)].log().item()
        else:
            log_phi = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
            total += log_phi.gather(1, truth[:, None]).sum().item()
    return total


def test_scores_are_the_enumerated_log_likelihoods_of_the_windows():
    model, pairs = tiny_model(), [*zip(PROMPTS, ANSWERS, strict=True)]
    expected = {
        name: [by_enumeration(model, *pair, coupled=name == "coupled") for pair in pairs]
        for name in ("factorized", "coupled")
    }
    for batch_size in (1, 3, 8):
        scores = model.score(PROMPTS, ANSWERS, batch_size=batch_size)
        assert scores.num_tokens.tolist() == [6, 3, 5]
        for name, values in expected.items():
            assert scores[name].tolist() == pytest.approx(values, abs=1e-4)


def test_without_a_head_both_scores_agree():
    bare = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    scores = bare.score(PROMPTS, ANSWERS)
    assert torch.equal(scores.factorized, scores.coupled)


def test_texts_are_scored_as_their_tokens(tiny_tokenizer):
    size = len(tiny_tokenizer)
    mask = tiny_tokenizer.mask_token_id
    model = CoDDModel.from_backbone(tiny_backbone(vocab_size=size), random_head(size))
    assert mask != MASK
    texts = (["Tom has", "Ann buys"], [" 3 boxes", " 12 apples"])
    ids = [tiny_tokenizer(part, add_special_tokens=False)["input_ids"] for part in texts]
    scores = model.score(*texts, tokenizer=tiny_tokenizer)
    assert torch.equal(scores.coupled, model.score(*ids).coupled)


@pytest.mark.parametrize(
    ("prompts", "answers", "said"),
    [
        ([[3]], [[4], [5]], "same, positive length, got 1 and 2"),
        ([], [], "same, positive length"),
        ([[3]], [[]], "`answers` must hold at least one token"),
        (["a"], ["b"], "`prompts` are texts: give a `tokenizer`"),
    ],
)
def test_bad_input_gets_one_clear_sentence(prompts, answers, said):
    with pytest.raises(ValueError, match=said):
        tiny_model().score(prompts, answers)
