"""Promises of the conditional fit of a head to a frozen backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fitting import equal_states, new_model, untimed

from codd_hf import CoDDHead, CoDDModel
from codd_hf.data.canvases import TokenizedExample
from codd_hf.data.noise import draw_canvases
from codd_hf.training import Checkpoints, ConditionalConfig, fit_conditional
from codd_hf.training.fits.conditional import Evidence
from tiny import correlated_examples, head_config, tiny_backbone

CONFIG = ConditionalConfig(
    max_steps=12,
    tokens_per_batch=128,
    windows_per_batch=8,
    learning_rate=0.1,
    context_learning_rate=0.02,
    warmup_steps=2,
    evaluation_steps=4,
    checkpointing_steps=4,
)
TRAIN, VALIDATION = correlated_examples(40), correlated_examples(20, seed=1)


def run(tokenizer, checkpoints=None, log=None, **changes):
    model = new_model(tokenizer)
    config = replace(CONFIG, **changes)
    history = fit_conditional(model, tokenizer, TRAIN, VALIDATION, config, checkpoints, log)
    return model, history


def test_fit_improves_the_held_out_gain_and_leaves_the_backbone_as_it_was(tiny_tokenizer):
    before, told = new_model(tiny_tokenizer).backbone.state_dict(), []
    changes = {"max_steps": 40, "evaluation_steps": 20, "evidence_temperature": 1.1}
    model, history = run(tiny_tokenizer, log=lambda *step: told.append(step), **changes)
    assert [entry["step"] for entry in history] == [0, 20, 40]
    assert history[-1]["gain"] > max(history[0]["gain"], 0) + 0.5
    after = model.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert [step for step, _ in told] == list(range(1, 41))
    losses = [values["loss"] for _, values in told]
    assert history[-1]["loss"] == pytest.approx(sum(losses[20:]) / 20)
    # What it was fitted at is what every door then uses.
    assert model.coupling_head.config.evidence_temperature == 1.1


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": ["latent"]},
        {"conditioning": ["copy"], "copy_length": 6},
        {"conditioning": ["latent"], "emission": "tied", "emission_rank": 8},
    ],
    ids=str,
)
def test_every_kind_of_head_learns(tiny_tokenizer, changes):
    model = new_model(tiny_tokenizer)
    changes = {"mask_token_id": 1, "num_latents": 6, "context_size": 16} | changes
    head = CoDDHead(head_config(len(tiny_tokenizer), **changes))
    if head.config.emission == "tied":
        head.bind(model.get_output_embeddings().weight)
    model.coupling_head.set_alpha(0.0)
    head.set_potentials(model.coupling_head.potentials)
    unigrams = torch.randn(6, head.config.vocab_size).log_softmax(-1)
    head.context_maps.start(unigrams, torch.full((6,), 1 / 6))
    model = CoDDModel.from_backbone(model.backbone, head)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    config = replace(CONFIG, max_steps=60, evaluation_steps=60)
    history = fit_conditional(model, tiny_tokenizer, TRAIN, VALIDATION, config)
    assert history[-1]["gain"] > history[0]["gain"] + 0.3
    assert all((p != before[name]).any() for name, p in head.named_parameters())


def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tiny_tokenizer, tmp_path):
    def interrupt(step, _):
        if step == 10:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "conditional")
    whole, history = run(tiny_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, checkpoints, interrupt)
    assert checkpoints.steps() == [4, 8]
    resumed, resumed_history = run(tiny_tokenizer, checkpoints)
    assert untimed(resumed_history) == untimed(history)
    assert equal_states(whole, resumed)
    with pytest.raises(
        ValueError, match=r"another `learning_rate` \(0\.1, not 0\.2\): continue with"
    ):
        run(tiny_tokenizer, checkpoints, learning_rate=0.2)


def test_untrained_head_gains_nothing(tiny_tokenizer):
    backbone = new_model(tiny_tokenizer).backbone
    config = head_config(len(tiny_tokenizer), mask_token_id=1, num_latents=6)
    model = CoDDModel.from_backbone(backbone, config)
    evidence = Evidence(model, tiny_tokenizer, VALIDATION, CONFIG, {}, num_draws=2)
    measured = evidence.evaluate(model.coupling_head)
    assert all(abs(value) < 1e-5 for value in measured.values())
    assert "gain_0.75-1.00" in measured


@pytest.mark.parametrize("size", [5, 1000])
def test_measured_gain_is_the_likelihood_over_the_factorized_one(tiny_tokenizer, size):
    model = new_model(tiny_tokenizer)
    config = ConditionalConfig(cache_size=size)
    for seed, example in enumerate(VALIDATION[:6]):
        cache = Evidence(model, tiny_tokenizer, [example], config, {}, seed=seed)
        scores = cache.scores(model.coupling_head, torch.tensor([0]))
        generator = torch.Generator().manual_seed(seed * 1_000_003)
        canvas, noise = draw_canvases(
            [example], tiny_tokenizer, 4, 1, generator, window_probability=1.0
        )
        starts = noise.span.long().argmax(1)
        ids = canvas.input_ids.masked_fill(noise.masked, 1)
        distribution = model(
            ids, canvas.attention_mask, window_start=starts, return_distribution=True
        ).distribution
        truth = canvas.input_ids[:, starts[0] : starts[0] + 4]
        tokens = distribution.factorized_logits.gather(-1, truth[..., None])[..., 0]
        expected = distribution.log_prob(truth) - tokens.masked_fill(~distribution.masked, 0).sum(1)
        assert torch.equal(scores.masked, noise.target.sum(1))
        # Half precision in the cache, and with 5 tokens kept the others' mass is spread.
        assert torch.allclose(scores.gain, expected, atol=0.02 if size == 1000 else 1.0)


def test_windows_start_where_decoding_starts_them(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    canvas, noise = draw_canvases(TRAIN, tiny_tokenizer, 4, 2, generator, window_probability=1.0)
    starts = noise.span.long().argmax(1)
    assert ((starts - canvas.answer_start) % 4 == 0).all()
    assert (starts + 4 <= canvas.answer_end).all()
    assert torch.equal(noise.span.sum(1), torch.full((len(TRAIN),), 4))


def test_model_that_cannot_be_fitted_is_an_error_that_says_so(tiny_tokenizer):
    bare = CoDDModel.from_backbone(tiny_backbone(vocab_size=len(tiny_tokenizer)))
    with pytest.raises(ValueError, match="`model` has no head to fit"):
        fit_conditional(bare, tiny_tokenizer, TRAIN, VALIDATION, CONFIG)
    model = new_model(tiny_tokenizer)
    model.backbone.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN"):
        fit_conditional(model, tiny_tokenizer, TRAIN, VALIDATION, CONFIG)


def test_text_that_the_circuit_rules_out_stops_the_run(tiny_tokenizer):
    model = new_model(tiny_tokenizer)
    model.coupling_head.emission.data[:, 19] = -torch.inf
    train = [*TRAIN, TokenizedExample([18], [19] * 7)]
    config = replace(CONFIG, cache_size=1000, windows_per_batch=41)
    with pytest.raises((FloatingPointError, ValueError), match=r"loss is|circuit rules out"):
        fit_conditional(model, tiny_tokenizer, train, VALIDATION, config)


def test_step_by_chunks_is_the_step_of_the_whole_batch(tiny_tokenizer, monkeypatch):
    model = new_model(tiny_tokenizer)
    sizes = {"windows_per_batch": 40, "windows_per_chunk": 7, "num_draws": 1}
    config = ConditionalConfig(max_steps=1, warmup_steps=1, **sizes)
    scores = Evidence(model, tiny_tokenizer, TRAIN, config, {}).scores(
        model.coupling_head, torch.arange(40)
    )
    expected_loss = -(scores.gain / scores.level).sum() / (4 * 40)
    expected = torch.autograd.grad(expected_loss, list(model.coupling_head.parameters()))
    steps, losses, optimizer_step = [], [], torch.optim.AdamW.step

    def watched(optimizer, *args):
        steps.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return optimizer_step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    told = {"log": lambda _, values: losses.append(values["loss"])}
    fit_conditional(model, tiny_tokenizer, TRAIN, VALIDATION, config, **told)
    assert losses == [pytest.approx(expected_loss.item(), rel=1e-5)]
    norm = torch.cat([g.flatten() for g in expected]).norm().clamp(min=1)
    for ours, theirs in zip(steps[0], expected, strict=True):
        assert torch.allclose(ours, theirs / norm, atol=1e-5)
