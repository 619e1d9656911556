"""Promises of the conditional fit of a head to a frozen backbone."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDModel
from codd_hf.training.checkpoint import load_checkpoint
from codd_hf.training.conditional import draw_windows, evaluate_head, fit_conditional, window_gains
from codd_hf.training.settings import ConditionalConfig
from tiny import Interrupted, correlated_examples, head_config, random_head, tiny_backbone

CONFIG = ConditionalConfig(
    max_steps=12,
    tokens_per_batch=128,
    learning_rate=0.1,
    warmup_steps=2,
    evaluation_steps=4,
    checkpointing_steps=4,
)
TRAIN, VALIDATION = correlated_examples(40), correlated_examples(20, seed=1)


def new_model(tokenizer, untrained: bool = False) -> CoDDModel:
    backbone = tiny_backbone(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, initializer_range=0.1
    )
    changes = {"mask_token_id": 1, "num_latents": 6}
    if untrained:
        return CoDDModel.from_backbone(backbone, head_config(len(tokenizer), **changes))
    head = random_head(len(tokenizer), **changes)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.3)
    return CoDDModel.from_backbone(backbone, head)


def run(tokenizer, train, folder=None, **changes):
    model = new_model(tokenizer)
    config = ConditionalConfig(**(vars(CONFIG) | changes))
    return model, fit_conditional(model, tokenizer, train, VALIDATION, folder, config)


def gains(history) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.mark.parametrize("loss", ["token", "elbo"])
def test_fit_improves_the_held_out_gain_and_leaves_the_backbone_as_it_was(tiny_tokenizer, loss):
    before = new_model(tiny_tokenizer).backbone.state_dict()
    model, history = run(tiny_tokenizer, TRAIN, max_steps=40, loss=loss, evaluation_steps=20)
    assert [entry["step"] for entry in history] == [0, 20, 40]
    assert history[-1]["gain"] > history[0]["gain"] + 0.5
    assert history[-1]["gain"] > 0.5
    after = model.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tiny_tokenizer, tmp_path):
    whole, history = run(tiny_tokenizer, TRAIN)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, Interrupted(TRAIN, 65), tmp_path)
    assert 0 < load_checkpoint(tmp_path / "conditional")[1]["step"] < 12
    resumed, resumed_history = run(tiny_tokenizer, TRAIN, tmp_path)
    assert gains(resumed_history) == gains(history)
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_untrained_head_gains_nothing(tiny_tokenizer):
    model = new_model(tiny_tokenizer, untrained=True)
    measured = evaluate_head(model, tiny_tokenizer, VALIDATION, CONFIG)
    assert all(abs(value) < 1e-5 for value in measured.values())
    assert "gain_0.75-1.00" in measured


def test_measured_gain_is_the_likelihood_over_the_factorized_one(tiny_tokenizer):
    model = new_model(tiny_tokenizer)
    generator = torch.Generator().manual_seed(0)
    canvas, noise, starts = draw_windows(VALIDATION[:6], tiny_tokenizer, 4, 1, generator)
    gain, masked = window_gains(model, canvas, noise, starts)
    ids = canvas.input_ids.masked_fill(noise.masked, 1)
    distribution = model(
        ids, canvas.attention_mask, window_start=starts, return_distribution=True
    ).distribution
    truth = torch.stack([canvas.input_ids[r, s : s + 4] for r, s in enumerate(starts.tolist())])
    tokens = distribution.factorized_logits.gather(-1, truth[..., None])[..., 0]
    expected = distribution.log_prob(truth) - tokens.masked_fill(~distribution.masked, 0).sum(1)
    assert torch.allclose(gain, expected, atol=1e-4)
    assert torch.equal(masked, noise.target.sum(1))


def test_windows_start_where_decoding_starts_them(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    canvas, noise, starts = draw_windows(TRAIN, tiny_tokenizer, 4, 2, generator)
    assert ((starts - canvas.answer_start) % 4 == 0).all()
    assert (starts + 4 <= canvas.answer_end).all()
    assert torch.equal(noise.span.sum(1), torch.full((len(TRAIN),), 4))


def test_model_without_a_head_is_an_error_that_says_what_to_give(tiny_tokenizer):
    model = CoDDModel.from_backbone(tiny_backbone(vocab_size=len(tiny_tokenizer)))
    with pytest.raises(ValueError, match="`model` has no head to fit"):
        fit_conditional(model, tiny_tokenizer, TRAIN, VALIDATION, config=CONFIG)


def test_backbone_that_gives_nan_is_an_error_that_says_so(tiny_tokenizer):
    model = new_model(tiny_tokenizer)
    model.backbone.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN"):
        fit_conditional(model, tiny_tokenizer, TRAIN, VALIDATION, config=CONFIG)


def test_unknown_precision_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match="`mixed_precision` must be 'no' or 'bf16', got 'fp16'"):
        ConditionalConfig(mixed_precision="fp16")
