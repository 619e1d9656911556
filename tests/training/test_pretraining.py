"""Promises of masked-diffusion pretraining."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from codd_hf import CoDDModel
from codd_hf.coupling.adapters import enable_adapters
from codd_hf.data.canvases import Example, collate, tokenize_examples
from codd_hf.data.noise import Noise, sample_noise
from codd_hf.training.fits.pretraining import (
    diffusion_loss,
    finetune_backbone,
    finetuning_config,
    pretrain_backbone,
    small_backbone_config,
)
from codd_hf.training.loop.checkpoints import Checkpoints
from codd_hf.training.settings import PretrainingConfig
from tiny import SENTENCES, Interrupted, tiny_backbone

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
    assert Checkpoints(tmp_path / "stopped").steps() == [4, 8]
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
    assert Checkpoints(tmp_path).steps() == []


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


def finetune(tokenizer, examples, folder, backbone, lora=None, **changes):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.0, "evaluation_steps": 6}
    options = {k: changes.pop(k) for k in ("log",) if k in changes}
    config = PretrainingConfig(**(vars(CONFIG) | settings | changes))
    return finetune_backbone(
        backbone, tokenizer, examples, examples[:4], folder, config, lora=lora, **options
    )


def lora(**changes) -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", **changes)


def test_given_backbone_is_trained_further_from_its_folder(tiny_tokenizer, examples, tmp_path):
    run(tiny_tokenizer, examples, tmp_path / "first", max_steps=6, learning_rate=1e-2)
    folder = str(tmp_path / "first")
    untouched = (tmp_path / "first" / "model.safetensors").read_bytes()
    told = []
    history = finetune(
        tiny_tokenizer,
        examples,
        tmp_path / "more",
        folder,
        max_steps=20,
        log=lambda _, values: told.append(values["loss"]),
    )
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == untouched
    assert len(told) == 20
    assert history[-1]["nats"] < history[0]["nats"] - 0.2
    before, after = (CoDDModel.from_backbone(tmp_path / name) for name in ("first", "more"))
    ids = torch.tensor([examples[0].prompt_ids])
    assert (before(ids).logits - after(ids).logits).abs().max() > 0.1


def test_lora_of_a_given_backbone_is_all_that_is_trained_and_written(
    tiny_tokenizer, examples, tmp_path
):
    given = tiny_backbone(vocab_size=len(tiny_tokenizer))
    given.save_pretrained(tmp_path / "first")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    history = finetune(tiny_tokenizer, examples, tmp_path / "lora", backbone, lora(), max_steps=24)
    assert history[-1]["nats"] < history[0]["nats"] - 0.5
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    ids = torch.tensor([examples[0].prompt_ids])
    joined = CoDDModel.from_backbone(tmp_path / "first", adapter=tmp_path / "lora")
    assert torch.allclose(joined(ids).logits, CoDDModel.from_backbone(backbone)(ids).logits)
    enable_adapters(joined.backbone, False)
    plain = CoDDModel.from_backbone(tmp_path / "first")
    assert torch.equal(joined(ids).logits, plain(ids).logits)


def test_fine_tuning_that_stopped_ends_bit_equal_to_one_that_did_not(
    tiny_tokenizer, examples, tmp_path
):
    options = {"lora": lora(lora_dropout=0.2), "mean_span_length": 2.0}
    whole, resumed = new_backbone(tiny_tokenizer), new_backbone(tiny_tokenizer)
    history = finetune(tiny_tokenizer, examples, tmp_path / "whole", whole, **options)

    def interrupt(step, _):
        if step == 7:
            raise KeyboardInterrupt

    folder, model = tmp_path / "stopped", new_backbone(tiny_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_tokenizer, examples, folder, model, log=interrupt, **options)
    torch.manual_seed(5)
    again = finetune(tiny_tokenizer, examples, folder, resumed, **options)
    assert steps_and_losses(again) == steps_and_losses(history)
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    model = new_backbone(tiny_tokenizer)
    with pytest.raises(ValueError, match=r"made with `mean_span_length` 2\.0, not 1\.0"):
        finetune(tiny_tokenizer, examples, folder, model, lora=options["lora"])


def test_given_backbone_gets_lower_rates_by_default():
    new, lora_rate, full = PretrainingConfig(), finetuning_config(True), finetuning_config(False)
    assert full.learning_rate < lora_rate.learning_rate < new.learning_rate / 5


def test_backbone_without_a_mask_token_needs_one_named(tiny_tokenizer, examples, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        finetune(tokenizer, examples, tmp_path, new_backbone(tiny_tokenizer))


def test_pretraining_that_diverges_says_so_and_leaves_no_backbone(
    tiny_tokenizer, examples, tmp_path
):
    with pytest.raises(FloatingPointError, match=r"validation's .* is nan: lower `learning_rate`"):
        run(tiny_tokenizer, examples, tmp_path, max_steps=2, learning_rate=1e30, evaluation_steps=1)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("size", [7, 130])
def test_hidden_size_that_attention_cannot_share_is_named(tiny_tokenizer, size):
    with pytest.raises(
        ValueError, match=rf"`hidden_size` must give each .*, got {size}: take a mul"
    ):
        small_backbone_config(tiny_tokenizer, hidden_size=size)
