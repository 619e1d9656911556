"""Promises of `CoDDScheduler`: what is committed, in which order, and what it is drawn from."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2

from codd_hf.circuits import CoupledCategorical, Potentials
from codd_hf.schedulers import CoDDScheduler
from codd_hf.schedulers.drawing import shape_logits

VOCAB, MASK, PAD, LENGTH = 11, 10, 9, 6


def make_distribution(
    num_windows: int = 1, observed: torch.Tensor | None = None, seed: int = 0, **kwargs
) -> tuple[CoupledCategorical, torch.Tensor]:
    """A random coupled distribution over windows of 6, and their tokens (masks where to draw)."""
    generator = torch.Generator().manual_seed(seed)
    potentials = Potentials(
        torch.randn(4, generator=generator),
        2 * torch.randn(1, 4, 4, generator=generator),
        2 * torch.randn(1, 4, VOCAB, generator=generator),
    )
    logits = torch.randn(num_windows, LENGTH, VOCAB, generator=generator)
    if observed is None:
        observed = torch.zeros(num_windows, LENGTH, dtype=torch.bool)
    tokens = torch.where(observed, torch.arange(LENGTH) % 8, MASK)
    forbidden = torch.zeros(VOCAB, dtype=torch.bool)
    forbidden[[MASK, PAD]] = True
    distribution = CoupledCategorical(
        logits,
        kwargs.pop("potentials", potentials),
        tokens=tokens,
        observed=observed,
        forbidden=forbidden,
        **kwargs,
    )
    return distribution, tokens


def make_scheduler(num_steps: int = 1, **config) -> CoDDScheduler:
    scheduler = CoDDScheduler(**config)
    scheduler.set_timesteps(num_steps)
    return scheduler


def test_timesteps_decrease_from_one_to_one_over_n():
    scheduler = make_scheduler(4)
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("num_steps", "counts"), [(4, [2, 2, 1, 1]), (5, [2, 1, 1, 1, 1])])
def test_remainder_of_uneven_steps_is_committed_first(num_steps, counts):
    scheduler = make_scheduler(num_steps)
    observed = torch.zeros(1, LENGTH, dtype=torch.bool)
    done = []
    for timestep in scheduler.timesteps:
        distribution, sample = make_distribution(observed=observed)
        output = scheduler.step(distribution, timestep, sample)
        assert torch.equal(output.prev_sample != MASK, observed | output.transfer_index)
        observed = observed | output.transfer_index
        done.append(int(output.transfer_index.sum()))
    assert done == counts
    assert observed.all()


def test_each_row_commits_its_own_number_of_tokens():
    observed = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    distribution, sample = make_distribution(2, observed)
    output = make_scheduler(2).step(distribution, 1.0, sample)
    assert output.transfer_index.sum(-1).tolist() == [1, 3]


def test_only_masked_present_and_eligible_positions_are_committed():
    observed = torch.tensor([[True, False, False, False, False, False]])
    present = torch.tensor([[True, True, True, True, False, False]])
    distribution, sample = make_distribution(1, observed, present=present)
    eligible = torch.tensor([[True, True, False, True, True, True]])
    output = make_scheduler().step(distribution, 1.0, sample, eligible=eligible)
    assert output.transfer_index.tolist() == [[False, True, False, True, False, False]]
    assert torch.equal(output.prev_sample[0, [0, 2]], sample[0, [0, 2]])


def test_windows_of_a_row_are_ranked_together():
    distribution, sample = make_distribution(4)
    sample = sample.view(2, 2 * LENGTH)
    output = make_scheduler(12).step(distribution, 1.0, sample)
    assert output.transfer_index.sum(-1).tolist() == [1, 1]
    best = distribution.marginals.amax(-1).view(2, -1).argmax(-1)
    assert torch.equal(
        make_scheduler(12, sampling="marginal")
        .step(distribution, 1.0, sample)
        .transfer_index.long()
        .argmax(-1),
        best,
    )


def test_strategies_rank_by_what_they_say():
    distribution, sample = make_distribution()
    marginals = distribution.marginals[0]
    best = marginals.topk(2).values
    expected = {
        "low_confidence": best[:, 0].argmax(),
        "margin": (best[:, 0] - best[:, 1]).argmax(),
        "entropy": torch.special.entr(marginals).sum(-1).argmin(),
    }
    for strategy, position in expected.items():
        scheduler = make_scheduler(6, strategy=strategy, sampling="marginal")
        output = scheduler.step(distribution, 1.0, sample)
        assert output.transfer_index[0].nonzero().tolist() == [[int(position)]]


def test_random_strategy_chooses_every_position_equally_often():
    distribution, sample = make_distribution(1000)
    scheduler = make_scheduler(6, strategy="random", sampling="factorized", temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    output = scheduler.step(distribution, 1.0, sample, generator=generator)
    counts = output.transfer_index.sum(0)
    assert counts.sum() == 1000
    assert ((counts - 1000 / 6) ** 2 / (1000 / 6)).sum() < chi2.ppf(0.9999, 5)


def test_ties_go_to_the_leftmost_position():
    logits = torch.zeros(1, 5, VOCAB)
    scheduler = make_scheduler(5, mask_token_id=MASK)
    output = scheduler.step(logits, 1.0, torch.full((1, 5), MASK))
    assert output.transfer_index.tolist() == [[True, False, False, False, False]]


def test_confidence_is_the_coupled_probability_at_evidence_temperature_one():
    distribution, sample = make_distribution()
    scheduler = make_scheduler(evidence_temperature=0.3, sampling="latent", temperature=0.5)
    generator = torch.Generator().manual_seed(1)
    output = scheduler.step(distribution, 1.0, sample, generator=generator)
    expected = distribution.marginals.gather(-1, output.sampled_tokens[..., None])[..., 0]
    torch.testing.assert_close(output.sampled_probs, expected)


def test_factorized_sampling_ignores_the_circuit():
    distribution, sample = make_distribution()
    scheduler = make_scheduler(sampling="factorized", temperature=1.0, evidence_temperature=0.5)
    output = scheduler.step(distribution, 1.0, sample)
    torch.testing.assert_close(
        output.pred_logits, distribution.with_temperature(0.5).factorized_logits
    )
    chosen = distribution.factorized_logits.exp().gather(-1, output.sampled_tokens[..., None])
    torch.testing.assert_close(output.sampled_probs, chosen[..., 0])


@pytest.mark.parametrize("sampling", ["factorized", "latent", "any_order", "marginal", "viterbi"])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {}, {"threshold": 0.5}])
def test_a_step_that_need_not_say_what_it_drew_from_draws_the_same(sampling, settings):
    if "threshold" in settings:
        settings = {"strategy": "joint", "temperature": 1.0, **settings}
    distribution, sample = make_distribution(2)
    scheduler = make_scheduler(2, sampling=sampling, **settings)
    outputs = [
        scheduler.step(
            distribution,
            1.0,
            sample,
            generator=torch.Generator().manual_seed(3),
            output_logits=wanted,
        )
        for wanted in (True, False)
    ]
    assert torch.equal(outputs[0].prev_sample, outputs[1].prev_sample)
    assert torch.equal(outputs[0].sampled_probs, outputs[1].sampled_probs)
    assert outputs[0].pred_logits is not None
    if sampling == "any_order":
        assert outputs[1].pred_logits is None


@pytest.mark.parametrize("sampling", ["factorized", "marginal"])
def test_tokens_are_drawn_from_pred_logits(sampling):
    """Chi-square at each position, over many rows that share one distribution."""
    one, _ = make_distribution()
    rows = 4000
    distribution = CoupledCategorical(
        one.logits.expand(rows, -1, -1), one.potentials, forbidden=one.forbidden
    )
    scheduler = make_scheduler(sampling=sampling, temperature=0.8, top_k=6, top_p=0.95)
    output = scheduler.step(
        distribution,
        1.0,
        torch.full((rows, LENGTH), MASK),
        generator=torch.Generator().manual_seed(3),
    )
    assert_drawn_from(output.sampled_tokens, output.pred_logits[0].exp())


def test_latent_draws_at_temperature_one_follow_the_exact_joint():
    one, _ = make_distribution()
    rows = 6000
    distribution = CoupledCategorical(
        one.logits.expand(rows, -1, -1), one.potentials, forbidden=one.forbidden
    )
    output = make_scheduler(sampling="latent", temperature=1.0).step(
        distribution,
        1.0,
        torch.full((rows, LENGTH), MASK),
        generator=torch.Generator().manual_seed(4),
    )
    assert_drawn_from(output.prev_sample, one.marginals[0])
    # Neighbouring pairs: against those of the distribution's own sampler.
    pairs = output.prev_sample[:, 0] * VOCAB + output.prev_sample[:, 1]
    own = one.sample((40000,), generator=torch.Generator().manual_seed(5))[:, 0]
    law = torch.bincount(own[:, 0] * VOCAB + own[:, 1], minlength=VOCAB**2) / len(own)
    assert 0.5 * (torch.bincount(pairs, minlength=VOCAB**2) / rows - law).abs().sum() < 0.06


def assert_drawn_from(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    for position, law in enumerate(probabilities):
        counts = torch.bincount(tokens[:, position], minlength=VOCAB)
        assert counts[law == 0].sum() == 0
        expected = law * len(tokens)
        kept = expected > 5
        statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
        assert statistic < chi2.ppf(0.9999, int(kept.sum()))


def test_temperature_zero_takes_the_most_probable_token_without_randomness():
    distribution, sample = make_distribution()
    output = make_scheduler(sampling="marginal").step(distribution, 1.0, sample)
    assert torch.equal(output.prev_sample, distribution.marginals.argmax(-1))
    assert torch.equal(output.pred_logits.exp().sum(-1), torch.ones(1, LENGTH))


@pytest.mark.parametrize("sampling", ["factorized", "latent", "marginal"])
def test_forbidden_tokens_are_never_drawn(sampling):
    distribution, sample = make_distribution(500)
    scheduler = make_scheduler(sampling=sampling, temperature=5.0)
    output = scheduler.step(distribution, 1.0, sample)
    assert not torch.isin(output.prev_sample, torch.tensor([MASK, PAD])).any()
    logits = torch.zeros(50, LENGTH, VOCAB)
    scheduler = make_scheduler(temperature=1.0, mask_token_id=MASK, forbidden_token_ids=[PAD])
    output = scheduler.step(logits, 1.0, torch.full((50, LENGTH), MASK))
    assert not torch.isin(output.prev_sample, torch.tensor([MASK, PAD])).any()


def test_rows_with_their_own_generator_do_not_depend_on_the_batch():
    distribution, sample = make_distribution(6, seed=7)
    sample = sample.view(3, 2 * LENGTH)
    for strategy in ("low_confidence", "random"):
        scheduler = make_scheduler(4, strategy=strategy, temperature=1.0, sampling="latent")
        generators = [torch.Generator().manual_seed(row) for row in range(3)]
        together = scheduler.step(distribution, 1.0, sample, generator=generators)
        for row in range(3):
            alone = CoupledCategorical(
                distribution.logits[2 * row : 2 * row + 2],
                distribution.potentials,
                forbidden=distribution.forbidden,
            )
            generator = [torch.Generator().manual_seed(row)]
            output = scheduler.step(alone, 1.0, sample[row : row + 1], generator=generator)
            assert torch.equal(output.prev_sample[0], together.prev_sample[row])


def test_top_k_keeps_exactly_k_tokens_even_among_ties():
    shaped = shape_logits(torch.zeros(2, VOCAB), 1.0, top_k=3)
    assert (shaped > -torch.inf).sum(-1).tolist() == [3, 3]
    torch.testing.assert_close(shaped.exp().sum(-1), torch.ones(2))


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert (shape_logits(logits, 1.0, top_p=0.65) > -torch.inf).tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert (shape_logits(logits, 1.0, top_p=0.01) > -torch.inf).sum() == 1
    torch.testing.assert_close(shape_logits(logits, 1.0, top_p=1.0), logits)


def test_temperature_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (shape_logits(logits, 0.2, top_p=0.75) > -torch.inf).sum() == 1


def test_circuit_is_applied_only_up_to_the_activation_ratio_of_each_window():
    observed = torch.zeros(2, LENGTH, dtype=torch.bool)
    observed[0, :4] = True  # a third of this window is masked, and all of the other
    distribution, sample = make_distribution(2, observed)
    scheduler = make_scheduler(sampling="marginal", temperature=1.0, activation_ratio=0.5)
    log_probs = scheduler.step(distribution, 1.0, sample).pred_logits.exp()
    torch.testing.assert_close(log_probs[0], distribution.marginals[0])
    torch.testing.assert_close(log_probs[1], distribution.factorized_logits[1].exp())


@pytest.mark.parametrize("sampling", ["latent", "marginal"])
def test_window_without_any_possible_completion_is_drawn_factorized(sampling):
    emission = torch.zeros(1, 2, VOCAB)
    emission[..., 3] = -torch.inf  # token 3, which the first window has, is impossible
    potentials = Potentials(torch.zeros(2), torch.zeros(1, 2, 2), emission)
    observed = torch.zeros(2, LENGTH, dtype=torch.bool)
    observed[0, 3] = True
    distribution, sample = make_distribution(2, observed, potentials=potentials)
    scheduler = make_scheduler(sampling=sampling, temperature=1.0)
    output = scheduler.step(distribution, 1.0, sample)
    assert output.fallback.tolist() == [True, False]
    torch.testing.assert_close(output.pred_logits[0], distribution.factorized_logits[0])
    assert (output.pred_logits[1, :, 3] == -torch.inf).all()
    assert not output.sampled_probs.isnan().any()


def test_plain_logits_are_decoded_factorized():
    logits = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0))
    sample = torch.full((2, 5), MASK)
    sample[0, 0] = 3
    output = make_scheduler(mask_token_id=MASK).step(logits, 1.0, sample)
    expected = logits[..., :MASK].argmax(-1)
    expected[0, 0] = 3
    assert torch.equal(output.prev_sample, expected)
    assert not output.transfer_index[0, 0]


def test_call_overrides_win_over_the_config():
    distribution, sample = make_distribution()
    scheduler = make_scheduler(sampling="factorized", temperature=1.0)
    output = scheduler.step(distribution, 1.0, sample, sampling="marginal", temperature=0.0)
    assert torch.equal(output.prev_sample, distribution.marginals.argmax(-1))


def test_output_can_be_a_tuple():
    distribution, sample = make_distribution()
    output = make_scheduler().step(distribution, 1.0, sample, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == 7


def test_add_noise_masks_each_row_at_its_own_rate():
    clean = torch.zeros(3, 20000, dtype=torch.long)
    scheduler = CoDDScheduler(mask_token_id=MASK)
    levels = torch.tensor([0.0, 0.3, 1.0])
    noisy = scheduler.add_noise(clean, levels, generator=torch.Generator().manual_seed(0))
    rate = (noisy == MASK).float().mean(-1)
    torch.testing.assert_close(rate, levels, atol=0.015, rtol=0)


def test_add_noise_leaves_what_is_not_maskable():
    clean = torch.arange(8).expand(2, -1)
    maskable = torch.arange(8) >= 4
    noisy = CoDDScheduler().add_noise(
        clean, 1.0, mask_token_id=MASK, maskable=maskable.expand(2, -1)
    )
    assert noisy[0].tolist() == [0, 1, 2, 3, MASK, MASK, MASK, MASK]


def test_scheduler_saves_and_loads_its_settings(tmp_path):
    scheduler = CoDDScheduler(strategy="margin", temperature=0.7, top_k=5)
    scheduler.save_pretrained(tmp_path)
    assert CoDDScheduler.from_pretrained(tmp_path).draw_settings() == scheduler.draw_settings()


def test_settings_that_left_load_where_they_changed_nothing_and_are_refused_elsewhere():
    saved = {"sampling": "marginal", "confidence": "marginal", "activation_scope": "window"}
    assert CoDDScheduler.from_config(saved).config.sampling == "marginal"
    with pytest.raises(ValueError, match="`confidence='latent'` in a configuration of CoDDSch"):
        CoDDScheduler.from_config(saved | {"confidence": "latent"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("strategy", "best", "one of low_confidence, margin, entropy, random"),
        ("sampling", "exact", "one of factorized, latent, any_order, marginal, viterbi"),
        ("temperature", -1.0, "at least 0"),
        ("temperature", 1e-30, "must be 0 or at least 1e-06"),
        ("temperature", float("nan"), "a finite number"),
        ("temperature", "hot", "a finite number"),
        ("evidence_temperature", 0, "at least 1e-06"),
        ("top_k", -2, "at least 0"),
        ("top_k", 2.5, "a whole number"),
        ("top_p", 1.5, "at most 1"),
        ("activation_ratio", 2, "at most 1"),
    ],
)
def test_bad_settings_get_one_clear_sentence(name, value, said):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`") as error:
        CoDDScheduler(**{name: value})
    assert said in str(error.value)
    assert str(value) in str(error.value)


def test_setting_that_does_not_exist_is_refused_with_those_spelt_alike():
    distribution, sample = make_distribution()
    with pytest.raises(TypeError, match="`top_q` is not a setting of the scheduler: use"):
        make_scheduler().step(distribution, 1.0, sample, top_q=3)


def test_wrong_calls_get_one_clear_sentence():
    distribution, sample = make_distribution()
    with pytest.raises(ValueError, match="call that first"):
        CoDDScheduler().step(distribution, 1.0, sample)
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 1, got 0"):
        make_scheduler(0)
    scheduler = make_scheduler(4)
    for timestep in (0.0, 0.6, 1.25):
        with pytest.raises(ValueError, match="`timestep` must be one of"):
            scheduler.step(distribution, timestep, sample)
    with pytest.raises(ValueError, match="`sample` must hold the tokens of 1 windows of 6"):
        scheduler.step(distribution, 1.0, sample[:, :5])
    with pytest.raises(ValueError, match="`generator` must have one entry per row"):
        scheduler.step(distribution, 1.0, sample, generator=[torch.Generator()] * 2)
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        scheduler.step(torch.zeros(1, LENGTH, VOCAB), 1.0, sample)
    with pytest.raises(ValueError, match="`timesteps` must be in"):
        scheduler.add_noise(sample, 1.5, mask_token_id=MASK)


@pytest.mark.parametrize("num_inference_steps", [1, 7, 1000, 2**20])
def test_all_timesteps_are_known_again_however_many_there_are(num_inference_steps):
    scheduler = make_scheduler(num_inference_steps)
    for index in {0, num_inference_steps // 2, num_inference_steps - 1}:
        timestep = scheduler.timesteps[index]
        assert scheduler._steps_left(timestep) == num_inference_steps - index
