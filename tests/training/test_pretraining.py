"""Promises of masked-diffusion training of a backbone: a new one, a given one, an adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fitting import equal_states, untimed
from transformers import AutoModelForCausalLM

from codd_hf import CoDDModel
from codd_hf.data.canvases import collate, tokenize_examples
from codd_hf.data.noise import Noise, sample_noise
from codd_hf.data.sources import Example
from codd_hf.training import Checkpoints, PretrainingConfig, fit_backbone
from codd_hf.training.fits.pretraining import diffusion_loss
from codd_hf.training.inputs import small_backbone_config
from tiny import SENTENCES

CONFIG = PretrainingConfig(
    max_steps=12,
    tokens_per_batch=128,
    warmup_steps=2,
    mixed_precision="no",
    evaluation_steps=4,
    checkpointing_steps=4,
)
GIVEN = {"learning_rate": 1e-2, "weight_decay": 0.0, "evaluation_steps": 6}


@pytest.fixture(scope="module")
def examples(tiny_tokenizer):
    pairs = [Example("Tell me.", sentence) for sentence in SENTENCES * 4]
    return tokenize_examples(pairs, tiny_tokenizer)


def new_model(tokenizer) -> CoDDModel:
    torch.manual_seed(0)
    config = small_backbone_config(tokenizer, hidden_size=32, num_layers=1)
    backbone = AutoModelForCausalLM.from_config(config)
    return CoDDModel.from_backbone(backbone, mask_token_id=1)


def run(tokenizer, examples, folder=None, *, model=None, new=True, log=None, **changes):
    model = new_model(tokenizer) if model is None else model
    config = replace(CONFIG, **changes)
    config = config.completed("new") if new else config
    checkpoints = None if folder is None else Checkpoints(folder)
    args = (tokenizer, examples, examples[:4], config, checkpoints, log)
    return model, fit_backbone(model, *args, window_length=4)


def test_training_lowers_the_loss(tiny_tokenizer, examples):
    changes = {"max_steps": 40, "learning_rate": 1e-2, "evaluation_steps": 10}
    model, history = run(tiny_tokenizer, examples, **changes)
    assert [entry["step"] for entry in history] == [0, 10, 20, 30, 40]
    assert history[-1]["elbo"] < history[0]["elbo"] - 1
    assert history[-1]["nats"] < history[0]["nats"] - 1
    assert history[-1]["tokens"] > history[1]["tokens"] > 10 * 64
    before, nats = new_model(tiny_tokenizer), history[-1]["nats"]
    # The same backbone, given, is trained further.
    _, further = run(tiny_tokenizer, examples, model=model, new=False, max_steps=30, **GIVEN)
    assert further[-1]["nats"] < nats - 0.1
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs)


@pytest.mark.parametrize("new", [True, False])
def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(
    tiny_tokenizer, examples, tmp_path, new
):
    options = {"new": new, "mean_span_length": 2.0}
    whole, history = run(tiny_tokenizer, examples, tmp_path / "whole", **options)

    def interrupt(step, _):
        if step == 10:
            raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, examples, folder, log=interrupt, **options)
    assert Checkpoints(folder).steps() == [4, 8]
    resumed, resumed_history = run(tiny_tokenizer, examples, folder, **options)
    assert untimed(resumed_history) == untimed(history)
    assert equal_states(whole, resumed)
    with pytest.raises(ValueError, match=r"another `mean_span_length` \(2\.0, not 1\.0\)"):
        run(tiny_tokenizer, examples, folder, **(options | {"mean_span_length": 1.0}))


def test_loss_that_is_no_longer_finite_is_an_error_that_says_what_to_lower(
    tiny_tokenizer, examples, tmp_path
):
    model = new_model(tiny_tokenizer)
    model.backbone.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match=r"elbo is nan at the validation .*`learning_rate`"
    ):
        run(tiny_tokenizer, examples, tmp_path, model=model)
    with pytest.raises(FloatingPointError, match=r"lower `learning_rate` \(now 1e\+30\)"):
        run(tiny_tokenizer, examples, tmp_path, max_steps=3, learning_rate=1e30)
    assert Checkpoints(tmp_path).steps() == []


def test_loss_is_the_cross_entropy_of_masked_tokens_weighted_by_one_over_t(
    tiny_tokenizer, examples
):
    model = new_model(tiny_tokenizer).eval()
    canvas = collate(examples[:3], tiny_tokenizer, 4)
    noise = sample_noise(canvas, window_length=4, generator=torch.Generator().manual_seed(0))
    loss, losses = diffusion_loss(model, canvas, noise)
    noisy = torch.where(noise.masked, tiny_tokenizer.mask_token_id, canvas.input_ids)
    logits = model(noisy, canvas.attention_mask).logits.log_softmax(-1)
    total, count = 0.0, 0
    for row, column in noise.target.nonzero().tolist():
        total -= (logits[row, column, canvas.input_ids[row, column]] / noise.level[row]).item()
        count += 1
    assert len(losses) == count
    assert loss.item() == pytest.approx(total / noise.span.sum().item(), rel=1e-4)


def test_loss_of_a_position_depends_on_later_tokens(tiny_tokenizer, examples):
    model = new_model(tiny_tokenizer).eval()
    canvas = collate(examples[:1], tiny_tokenizer, 4)
    hidden = torch.zeros_like(canvas.input_ids, dtype=torch.bool)
    hidden[0, 3] = True
    row = torch.ones(1)
    noise = Noise(hidden, hidden, hidden, level=row, window=row.long(), end=canvas.answer_end)
    _, before = diffusion_loss(model, canvas, noise)
    canvas.input_ids[0, -1] = 40
    _, after = diffusion_loss(model, canvas, noise)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("size", [7, 130])
def test_size_that_gives_no_heads_of_attention_is_refused(tiny_tokenizer, size):
    with pytest.raises(
        ValueError, match=rf"`hidden_size` must give each .*, got {size}: take a mul"
    ):
        small_backbone_config(tiny_tokenizer, hidden_size=size)
