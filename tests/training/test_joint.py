"""Promises of the joint fit of backbone and head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fitting import equal_states, new_model, untimed
from peft import PeftModel
from safetensors.torch import load_file

from codd_hf import CoDDModel
from codd_hf.data.canvases import TokenizedExample
from codd_hf.training import (
    Checkpoints,
    JointConfig,
    fit_joint,
)
from codd_hf.training.windows import NoisedCanvases, window_scores
from tiny import correlated_examples, enumerate_window, tiny_backbone, tiny_model

SETTINGS = {
    "max_steps": 10,
    "windows_per_batch": 6,
    "windows_per_chunk": 4,
    "backbone_learning_rate": 0.01,
    "learning_rate": 0.05,
    "context_learning_rate": 0.02,
    "warmup_steps": 2,
    "num_validation_draws": 1,
    "evaluation_steps": 5,
    "checkpointing_steps": 3,
    "lora_rank": 2,
}
TRAIN, VALIDATION = correlated_examples(40), correlated_examples(20, seed=1)


def run(tokenizer, folder=None, model=None, train=TRAIN, log=None, dropout=None, **changes):
    model = new_model(tokenizer, backbone=dropout or {}) if model is None else model
    config = JointConfig(**(SETTINGS | changes))
    checkpoints = None if folder is None else Checkpoints(folder)
    return model, fit_joint(model, tokenizer, train, VALIDATION, config, checkpoints, log)


def backbone_weights(model) -> dict[str, torch.Tensor]:
    state = model.backbone.state_dict()
    return {k.replace("base_layer.", ""): v.clone() for k, v in state.items() if "lora" not in k}


@pytest.mark.parametrize("backbone", ["lora", "full", "frozen"])
def test_held_out_likelihood_rises_and_only_what_is_asked_for_changes(tiny_tokenizer, backbone):
    before = backbone_weights(new_model(tiny_tokenizer))
    model, history = run(tiny_tokenizer, backbone=backbone, max_steps=24, evaluation_steps=12)
    assert [entry["step"] for entry in history] == [0, 12, 24]
    assert history[-1]["coupled_nats"] < history[0]["coupled_nats"] - 0.5
    nats = history[-1]["factorized_nats"] - history[-1]["gain"]
    assert history[-1]["coupled_nats"] == pytest.approx(nats)
    after = backbone_weights(model)
    same = all(torch.equal(after[name], value) for name, value in before.items())
    assert same == (backbone != "full")
    if backbone == "frozen":
        assert history[-1]["factorized_nats"] == history[0]["factorized_nats"]
        assert not any(p.requires_grad for p in model.backbone.parameters())
    else:
        assert history[-1]["factorized_nats"] < history[0]["factorized_nats"] - 0.3


def test_gradient_checkpointing_changes_no_weight_and_is_off_afterwards(tiny_tokenizer):
    plain, _ = run(tiny_tokenizer)
    model, _ = run(tiny_tokenizer, gradient_checkpointing=True)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.backbone.modules())


@pytest.mark.parametrize("seed", range(3))
def test_window_likelihoods_are_those_of_enumeration(seed):
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    examples = [
        TokenizedExample([5, 6, 7, 8], [9, 3, 4, 1]),
        TokenizedExample([9], [7, 6, 5, 4, 3]),
    ]
    model = tiny_model()
    windows = NoisedCanvases(model, tokenizer, examples, JointConfig(), seed)
    scores = windows.scores()
    for row, start in enumerate(windows.starts.tolist()):
        place, real = slice(start, start + 4), windows.mask[row].bool()
        ids, truth = windows.ids[row, place], windows.truth[row]
        logits = model(windows.ids[row, real][None]).logits[0, place]
        texts, probabilities = enumerate_window(model.coupling_head, logits, ids, 2)
        expected = probabilities[(texts == truth).all(1)].log().item()
        assert scores.log_prob[row].item() == pytest.approx(expected, abs=1e-4)
        logits[:, 2] = -torch.inf
        tokens = logits.log_softmax(-1).gather(1, truth[:, None])[ids == 2]
        assert scores.factorized[row].item() == pytest.approx(tokens.sum().item(), abs=1e-4)
        assert scores.masked[row] == len(tokens)


def test_accumulated_step_is_the_gradient_of_the_models_own_loss(tiny_tokenizer, monkeypatch):
    steps, told, drawn = [], [], []
    optimizer_step, draw = torch.optim.AdamW.step, NoisedCanvases.__init__

    def watched(optimizer, *args):
        steps.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return optimizer_step(optimizer, *args)

    def recorded(self, *args):
        draw(self, *args)
        drawn.append(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(NoisedCanvases, "__init__", recorded)
    changes = {"backbone": "full", "max_steps": 1, "windows_per_batch": 12}
    model = new_model(tiny_tokenizer)
    run(tiny_tokenizer, None, model, log=lambda _, v: told.append(v), **changes)
    chunks = drawn[1:-1]  # the first and the last are of the validation
    assert [len(c.level) for c in chunks] == [4, 4, 4]

    model = new_model(tiny_tokenizer)
    total = 0.0
    for chunk in chunks:
        for row, start in enumerate(chunk.starts.tolist()):
            ids = chunk.ids[row : row + 1]
            labels = torch.full_like(ids, -100)
            labels[0, start : start + 4] = chunk.truth[row]
            if not chunk.masked[row].any():
                continue
            mean = model(ids, chunk.mask[row : row + 1], labels=labels).loss
            total = total + chunk.masked[row].sum() * mean / chunk.level[row]
    expected_loss = total / (4 * 12)
    assert told[0]["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    head, body = list(model.coupling_head.parameters()), list(model.backbone.parameters())
    expected = torch.autograd.grad(expected_loss, head + body)
    ours = steps[0]
    for theirs in (expected[: len(head)], expected[len(head) :]):
        norm = torch.cat([g.flatten() for g in theirs]).norm().clamp(min=1)
        for gradient in theirs:
            assert torch.allclose(ours.pop(0), gradient / norm, atol=1e-5)
    assert not ours


@pytest.mark.parametrize(
    "changes",
    [{"backbone": "lora"}, {"backbone": "full", "mean_span_length": 2.0}],
    ids=["lora", "full"],
)
def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tiny_tokenizer, tmp_path, changes):
    changes["dropout"] = {"attention_dropout": 0.3}
    whole, history = run(tiny_tokenizer, tmp_path / "whole", **changes)
    reached = []

    def interrupt(step, _):
        reached.append(step)
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, tmp_path / "stopped", log=interrupt, **changes)
    assert Checkpoints(tmp_path / "stopped").steps() == [3, 6]
    torch.manual_seed(99)
    resumed, resumed_history = run(tiny_tokenizer, tmp_path / "stopped", **changes)
    assert untimed(resumed_history) == untimed(history)
    assert equal_states(whole, resumed)


def test_bf16_backbone_is_trained_in_float32(tiny_tokenizer):
    for backbone in ("lora", "full"):
        model = new_model(tiny_tokenizer)
        model.backbone.to(torch.bfloat16)
        changes = {"max_steps": 12, "evaluation_steps": 12, "mixed_precision": "bf16"}
        model, history = run(tiny_tokenizer, None, model, backbone=backbone, **changes)
        assert history[-1]["coupled_nats"] < history[0]["coupled_nats"] - 0.3
        kinds = {p.dtype for p in model.parameters() if p.requires_grad}
        assert kinds == {torch.float32}


def test_lora_is_saved_and_loaded_with_its_head(tiny_tokenizer, tmp_path):
    model, _ = run(tiny_tokenizer)
    config = JointConfig(**SETTINGS)

    def coupled(other):
        return window_scores(other, tiny_tokenizer, VALIDATION, config, 1).log_prob

    expected = coupled(model)
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert torch.equal(coupled(CoDDModel.from_pretrained(tmp_path / "model")), expected)
    model.save_head(tmp_path / "head")
    stored = load_file(tmp_path / "head" / "model.safetensors")
    assert sorted(stored) == ["emission", "initial", "token_marginal", "transition"]
    plain = new_model(tiny_tokenizer).backbone
    joined = CoDDModel.from_backbone(plain, tmp_path / "head")
    assert torch.equal(coupled(joined), expected)
    lone = PeftModel.from_pretrained(
        new_model(tiny_tokenizer).backbone, tmp_path / "head" / "adapter"
    )
    ids = torch.tensor([[18, 10, 1, 1]])
    assert torch.allclose(lone(ids).logits, model.backbone(ids).logits, atol=1e-5)
    _, history = run(tiny_tokenizer, None, joined, max_steps=1)  # its adapter is trained further
    assert history[0]["coupled_nats"] == pytest.approx(
        window_scores(model, tiny_tokenizer, VALIDATION, config, 1).summary()["coupled_nats"]
    )
    assert list(joined.backbone.peft_config) == ["default"]
    assert any("lora" in n for n, p in joined.named_parameters() if p.requires_grad)


def test_other_settings_text_or_model_are_refused(tiny_tokenizer, tmp_path):
    run(tiny_tokenizer, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"another `lora_rank` \(2, not 3\): continue with"):
        run(tiny_tokenizer, tmp_path, lora_rank=3)
    with pytest.raises(ValueError, match="made with another `data`"):
        run(tiny_tokenizer, tmp_path, train=TRAIN[::-1])
    with pytest.raises(ValueError, match="`model` has no head to fit"):
        run(tiny_tokenizer, None, CoDDModel.from_backbone(tiny_backbone()))
    with pytest.raises(ValueError, match="`backbone` must be one of lora, full, frozen, got 'all'"):
        JointConfig(backbone="all")
