"""Promises of masked-diffusion pretraining."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from codd_hf import CoDDModel
from codd_hf.training.checkpoint import load_checkpoint
from codd_hf.training.data import Example, collate, tokenize_examples
from codd_hf.training.noise import Noise, sample_noise
from codd_hf.training.pretraining import (
    diffusion_loss,
    pretrain_backbone,
    small_backbone_config,
)
from codd_hf.training.settings import PretrainingConfig
from tiny import SENTENCES, Interrupted

CONFIG = PretrainingConfig(
    max_steps=12,
    tokens_per_batch=128,
    warmup_steps=2,
    window_length=4,
    mixed_precision="no",
    evaluation_steps=4,
    checkpointing_steps=4,
)


@pytest.fixture(scope="module")
def examples(tiny_tokenizer):
    pairs = [Example("Tell me.", sentence) for sentence in SENTENCES * 4]
    return tokenize_examples(pairs, tiny_tokenizer)


def new_backbone(tokenizer):
    torch.manual_seed(0)
    config = small_backbone_config(tokenizer, hidden_size=32, num_layers=1)
    config.is_causal = False
    return AutoModelForCausalLM.from_config(config)


def run(tokenizer, examples, folder, **changes):
    config = PretrainingConfig(**(vars(CONFIG) | changes))
    model = new_backbone(tokenizer)
    return model, pretrain_backbone(model, tokenizer, examples, examples[:4], folder, config)


def steps_and_losses(history) -> list[tuple]:
    return [(entry["step"], entry["elbo"], entry["nats"], entry["tokens"]) for entry in history]


def test_training_lowers_the_loss_and_writes_a_backbone_that_loads(
    tiny_tokenizer, examples, tmp_path
):
    model, history = run(
        tiny_tokenizer, examples, tmp_path, max_steps=40, learning_rate=1e-2, evaluation_steps=2
    )
    assert [entry["step"] for entry in history] == list(range(2, 41, 2))
    assert history[-1]["elbo"] < history[0]["elbo"] - 1
    assert history[-1]["nats"] < history[0]["nats"] - 1
    loaded = CoDDModel.from_backbone(tmp_path)
    ids = torch.tensor([examples[0].prompt_ids])
    assert torch.allclose(loaded(ids).logits, CoDDModel.from_backbone(model)(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == tiny_tokenizer.mask_token_id


def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tiny_tokenizer, examples, tmp_path):
    whole, history = run(tiny_tokenizer, examples, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, Interrupted(examples, 40), tmp_path / "stopped")
    assert 0 < load_checkpoint(tmp_path / "stopped" / "checkpoint")[1]["step"] < 12
    assert not (tmp_path / "stopped" / "config.json").exists()
    resumed, resumed_history = run(tiny_tokenizer, examples, tmp_path / "stopped")
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert steps_and_losses(resumed_history) == steps_and_losses(history)


def test_loss_that_is_no_longer_finite_is_an_error_that_says_what_to_lower(
    tiny_tokenizer, examples, tmp_path
):
    model = new_backbone(tiny_tokenizer)
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0: lower `learning_rate`"):
        pretrain_backbone(model, tiny_tokenizer, examples, examples[:4], tmp_path, CONFIG)
    assert not (tmp_path / "checkpoint").exists()


def test_loss_is_the_cross_entropy_of_masked_tokens_weighted_by_one_over_t(
    tiny_tokenizer, examples
):
    model = new_backbone(tiny_tokenizer).eval()
    canvas = collate(examples[:3], window_length=4, eos_token_id=2, pad_token_id=0)
    noise = sample_noise(canvas, window_length=4, generator=torch.Generator().manual_seed(0))
    loss, losses = diffusion_loss(model, canvas, noise, tiny_tokenizer.mask_token_id)
    noisy = torch.where(noise.masked, tiny_tokenizer.mask_token_id, canvas.input_ids)
    logits = CoDDModel.from_backbone(model)(noisy, canvas.attention_mask).logits.log_softmax(-1)
    total, count = 0.0, 0
    for row, column in noise.target.nonzero().tolist():
        total -= (logits[row, column, canvas.input_ids[row, column]] / noise.level[row]).item()
        count += 1
    assert len(losses) == count
    assert loss.item() == pytest.approx(total / noise.span.sum().item(), rel=1e-4)


def test_loss_of_a_position_depends_on_later_tokens(tiny_tokenizer, examples):
    model = new_backbone(tiny_tokenizer).eval()
    canvas = collate(examples[:1], window_length=4, eos_token_id=2, pad_token_id=0)
    hidden = torch.zeros_like(canvas.input_ids, dtype=torch.bool)
    hidden[0, 3] = True
    noise = Noise(masked=hidden, target=hidden, span=hidden, level=torch.ones(1))
    _, before = diffusion_loss(model, canvas, noise, 1)
    canvas.input_ids[0, -1] = 40
    _, after = diffusion_loss(model, canvas, noise, 1)
    assert not torch.equal(before, after)
