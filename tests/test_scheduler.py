"""Promises of `CoDDScheduler`: what is committed, in which order, and what it is drawn from."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2

from codd_hf.circuits import CoupledCategorical, Potentials
from codd_hf.schedulers.drawing import shape_logits
from codd_hf.schedulers.scheduling_codd import CoDDScheduler
from tiny import tiny_model

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


@pytest.mark.parametrize(
    ("strategy", "num_steps", "counts"),
    [
        ("low_confidence", 4, [2, 2, 1, 1]),
        ("low_confidence", 5, [2, 1, 1, 1, 1]),
        ("joint", 2, [2, 4]),
        ("joint", 3, [1, 2, 3]),
    ],
)
def test_a_step_commits_its_share(strategy, num_steps, counts):
    """An equal one, remainders first; `joint`, where nothing is sure, begins with the smallest."""
    scheduler = make_scheduler(num_steps, strategy=strategy, threshold=1.0)
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


def test_temperature_then_exactly_top_k_then_the_fewest_that_reach_top_p():
    assert (shape_logits(torch.zeros(2, VOCAB), 1.0, top_k=3) > -torch.inf).sum(-1).eq(3).all()
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    for settings, kept in (
        ({"temperature": 1.0, "top_p": 0.65}, [0, 2]),
        ({"temperature": 1.0, "top_p": 0.01}, [0]),
        ({"temperature": 1.0, "top_p": 1.0}, [0, 1, 2, 3]),
        ({"temperature": 0.2, "top_p": 0.75}, [0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 2, 3]),
    ):
        shaped = shape_logits(logits, **settings)
        assert (shaped > -torch.inf).nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(shaped.exp().sum(), torch.tensor(1.0))


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
    with pytest.warns(UserWarning, match="share no completion of a window"):
        output = scheduler.step(distribution, 1.0, sample)
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


def test_add_noise_masks_each_row_at_its_own_rate():
    clean = torch.zeros(3, 20000, dtype=torch.long)
    scheduler = CoDDScheduler(mask_token_id=MASK)
    levels = torch.tensor([0.0, 0.3, 1.0])
    noisy = scheduler.add_noise(clean, levels, generator=torch.Generator().manual_seed(0))
    rate = (noisy == MASK).float().mean(-1)
    torch.testing.assert_close(rate, levels, atol=0.015, rtol=0)


def test_scheduler_saves_and_loads_its_settings(tmp_path):
    scheduler = CoDDScheduler(strategy="margin", temperature=0.7, top_k=5)
    scheduler.save_pretrained(tmp_path)
    assert CoDDScheduler.from_pretrained(tmp_path).settings == scheduler.settings


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
        ("temperature", "hot", "a number"),
        ("evidence_temperature", 0, "at least 1e-06"),
        ("top_k", -2, "at least 0"),
        ("top_k", 2.5, "an integer"),
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
    with pytest.raises(ValueError, match="`set_timesteps` sets them"):
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
    with pytest.raises(ValueError, match="`mask_token_id` is not known"):
        scheduler.step(torch.zeros(1, LENGTH, VOCAB), 1.0, sample)
    with pytest.raises(ValueError, match="`timesteps` must be in"):
        scheduler.add_noise(sample, 1.5, mask_token_id=MASK)


def test_step_that_a_subclass_overrides_is_the_one_that_decoding_takes():
    class Late(CoDDScheduler):
        """Keeps token 5 out of every candidate."""

        def step(self, *args, **kwargs):
            steps.append(self.settings.sampling)
            return super().step(*args, **kwargs | {"forbidden_token_ids": [5]})

    steps, model = [], tiny_model()
    call = {"max_new_tokens": 8, "num_inference_steps": 4, "sampling": "marginal"}
    tokens = model.generate(torch.tensor([[6, 7]]), scheduler=Late(), **call)
    assert steps == ["marginal"] * 4
    assert not (tokens == 5).any()
