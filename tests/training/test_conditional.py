"""Promises of the conditional fit of a head to a frozen backbone."""

from __future__ import annotations

import re

import pytest
import torch

from codd_hf import CoDDHead, CoDDModel
from codd_hf.data.canvases import TokenizedExample
from codd_hf.data.noise import draw_windows
from codd_hf.training.evidence.cache import cache_windows
from codd_hf.training.fits.conditional import fit_conditional, fit_head
from codd_hf.training.fits.gains import evaluate_head, window_gains
from codd_hf.training.loop.checkpoints import Checkpoints
from codd_hf.training.settings import ConditionalConfig, EvidenceConfig
from tiny import correlated_examples, head_config, random_head, tiny_backbone

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


def run(tokenizer, train, folder=None, stop_after=None, **changes):
    model = new_model(tokenizer)
    if stop_after is not None:
        calls = iter(range(stop_after))

        def interrupt(*_):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        model.coupling_head.register_forward_pre_hook(interrupt)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": ["latent"]},
        {"conditioning": ["latent"], "noise_conditioning": True},
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
    if changes["num_latents"] == 6:
        circuit = model.coupling_head.potentials
        head.set_potentials(circuit.scaled_by_marginal(model.coupling_head.token_marginal.log(), 1))
    else:
        torch.manual_seed(0)
        for parameter in head.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.5)
    latents, vocab = head.config.num_latents, head.config.vocab_size
    law = torch.randn(latents, vocab).log_softmax(-1)
    head.context_maps.start(law, torch.full((latents,), 1 / latents))
    model = CoDDModel.from_backbone(model.backbone, head)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    config = ConditionalConfig(**(vars(CONFIG) | {"max_steps": 60, "evaluation_steps": 60}))
    history = fit_conditional(model, tiny_tokenizer, TRAIN, VALIDATION, config=config)
    assert history[-1]["gain"] > history[0]["gain"] + 0.3
    assert all((p != before[name]).any() for name, p in head.named_parameters())


def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tiny_tokenizer, tmp_path):
    whole, history = run(tiny_tokenizer, TRAIN)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, TRAIN, tmp_path, stop_after=12)
    assert 0 < Checkpoints(tmp_path / "conditional").steps()[-1] < 12
    resumed, resumed_history = run(tiny_tokenizer, TRAIN, tmp_path)
    assert gains(resumed_history) == gains(history)
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_untrained_head_gains_nothing(tiny_tokenizer):
    model = new_model(tiny_tokenizer, untrained=True)
    cache = cache_windows(
        model, tiny_tokenizer, VALIDATION, EvidenceConfig(num_draws=2), progress=False
    )
    measured = evaluate_head(model.coupling_head, cache)
    assert all(abs(value) < 1e-5 for value in measured.values())
    assert "gain_0.75-1.00" in measured


@pytest.mark.parametrize("top_k", [5, 1000])
def test_measured_gain_is_the_likelihood_over_the_factorized_one(tiny_tokenizer, top_k):
    model = new_model(tiny_tokenizer)
    for seed, example in enumerate(VALIDATION[:6]):
        config = EvidenceConfig(top_k=top_k, seed=seed)
        cache = cache_windows(model, tiny_tokenizer, [example], config, progress=False)
        gain, masked = window_gains(model.coupling_head, cache, torch.tensor([0]))
        generator = torch.Generator().manual_seed(seed * 1_000_003)
        canvas, noise, starts = draw_windows([example], tiny_tokenizer, 4, 1, generator)
        ids = canvas.input_ids.masked_fill(noise.masked, 1)
        distribution = model(
            ids, canvas.attention_mask, window_start=starts, return_distribution=True
        ).distribution
        truth = canvas.input_ids[:, starts[0] : starts[0] + 4]
        tokens = distribution.factorized_logits.gather(-1, truth[..., None])[..., 0]
        expected = distribution.log_prob(truth) - tokens.masked_fill(~distribution.masked, 0).sum(1)
        assert torch.equal(masked, noise.target.sum(1))
        # Half precision in the cache, and with 5 tokens kept the others' mass is spread.
        assert torch.allclose(gain, expected, atol=0.02 if top_k == 1000 else 1.0)


def test_cache_keeps_hidden_states_for_a_conditioned_head_only(tiny_tokenizer):
    model = new_model(tiny_tokenizer)
    cache = cache_windows(
        model, tiny_tokenizer, VALIDATION, EvidenceConfig(num_draws=2), progress=False
    )
    windows = cache.take(torch.arange(len(cache)))
    assert windows.hidden is None
    assert len(cache) == 40
    assert len(windows.log_rest) == windows.masked.sum()
    changes = {"mask_token_id": 1, "conditioning": ["latent"], "context_size": 16}
    head = random_head(len(tiny_tokenizer), **changes)
    model = CoDDModel.from_backbone(model.backbone, head)
    cache = cache_windows(model, tiny_tokenizer, VALIDATION, progress=False)
    assert cache.take(torch.arange(20)).hidden.shape == (20, 4, model.config.hidden_size)


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
    known = "'auto' or 'no' or 'bf16'"
    with pytest.raises(ValueError, match=f"`mixed_precision` must be {known}, got 'fp16'"):
        ConditionalConfig(mixed_precision="fp16")


def test_checkpoint_of_another_run_is_refused_and_the_setting_named(tiny_tokenizer, tmp_path):
    run(tiny_tokenizer, TRAIN, tmp_path, max_steps=4)
    with pytest.raises(
        ValueError, match=r"made with `learning_rate` 0\.1, not 0\.2: continue with"
    ):
        run(tiny_tokenizer, TRAIN, tmp_path, learning_rate=0.2)


@pytest.mark.parametrize("kind", ["nan", "impossible"])
def test_loss_that_is_not_finite_stops_the_run_and_names_the_windows(tiny_tokenizer, kind):
    model = new_model(tiny_tokenizer)
    config = EvidenceConfig(top_k=1000)
    train, validation = (
        cache_windows(model, tiny_tokenizer, examples, config, progress=False)
        for examples in ([*TRAIN, TokenizedExample([18], [19] * 7)], VALIDATION)
    )
    windows = train.parts[0]
    if kind == "nan":
        bad = [int(windows.offsets.diff().argmax())]
        windows.log_probs[windows.offsets[bad[0]]] = torch.nan
    else:
        bad = (windows.tokens == 19).any(1).nonzero()[:, 0].tolist()
        model.coupling_head.emission.data[:, 19] = -torch.inf
    settings = ConditionalConfig(**(vars(CONFIG) | {"windows_per_batch": 41}))
    with pytest.raises(
        FloatingPointError, match=r"The loss is .* at step 0, from the windows"
    ) as e:
        fit_head(model.coupling_head, train, validation, config=settings)
    named = {int(number) for number in re.findall(r"\d+", str(e.value).split("[")[1].split("]")[0])}
    assert named == set(bad)
    assert len(bad) == 1


def test_every_step_is_told(tiny_tokenizer):
    told = []
    model = new_model(tiny_tokenizer)
    history = fit_conditional(
        model, tiny_tokenizer, TRAIN, VALIDATION, config=CONFIG, log=lambda *step: told.append(step)
    )
    assert [step for step, _ in told] == list(range(1, 13))
    losses = [values["loss"] for _, values in told]
    assert history[-1]["loss"] == pytest.approx(sum(losses[8:]) / 4)


@pytest.mark.parametrize("loss", ["token", "elbo"])
def test_step_by_chunks_is_the_step_of_the_whole_batch(tiny_tokenizer, loss):
    model = new_model(tiny_tokenizer)
    head = model.coupling_head
    cache = cache_windows(model, tiny_tokenizer, TRAIN, progress=False)
    losses = []
    config = ConditionalConfig(
        max_steps=1, warmup_steps=1, windows_per_batch=40, windows_per_chunk=7, loss=loss
    )
    gains, masked = window_gains(head, cache, torch.arange(40))
    weight = 1 / cache.level if loss == "elbo" else 1
    norm = 4 * 40 if loss == "elbo" else masked.sum()
    expected = torch.autograd.grad(-(gains * weight).sum() / norm, list(head.parameters()))
    steps = []
    optimizer_step = torch.optim.AdamW.step

    def watched(optimizer, *args):
        steps.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return optimizer_step(optimizer, *args)

    torch.optim.AdamW.step = watched
    try:
        fit_head(head, cache, cache, config=config, log=lambda _, v: losses.append(v["loss"]))
    finally:
        torch.optim.AdamW.step = optimizer_step
    assert losses == [pytest.approx((-(gains * weight).sum() / norm).item(), rel=1e-5)]
    norm = torch.cat([g.flatten() for g in expected]).norm().clamp(min=1)
    for ours, theirs in zip(steps[0], expected, strict=True):
        assert torch.allclose(ours, theirs / norm, atol=1e-5)
