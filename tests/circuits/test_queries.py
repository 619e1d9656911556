"""`log_partition`, `log_prob`, marginals, posteriors and best paths against enumeration."""

import pytest
import torch
from agreement import assert_logs_agree, assert_probabilities_agree
from cases import (
    ALL,
    AWKWARD,
    STRUCTURED,
    STRUCTURES,
    enumerations,
    every_completion,
    impossible_case,
    random_case,
    underflow_case,
)

EXACT = pytest.mark.parametrize("name", ALL)
IN_FLOAT64 = [*AWKWARD, *STRUCTURES, *STRUCTURED]
EXACT_IN_BOTH = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ALL] + [(name, torch.float64) for name in IN_FLOAT64],
)


def coupled_rows(name):
    """The rows that the circuit has a say in, with their enumerations."""
    active = ALL[name].options.get("active", torch.ones(len(ALL[name]), dtype=torch.bool))
    exact = enumerations(name)
    return [(row, exact[row]) for row in range(len(exact)) if active[row] and exact[row].positions]


def tolerance(exact, dtype):
    """A probability is off by what rounding does to the largest log-weight that matters."""
    return max(1e-5, exact.rounding) if dtype == torch.float32 else 1e-10


@EXACT_IN_BOTH
def test_log_partition_is_the_sum_over_all_completions_and_paths(name, dtype):
    ours = ALL[name].distribution(dtype).log_partition
    assert ours.dtype == dtype
    for row, exact in coupled_rows(name):
        close = 1e-5 if dtype == torch.float32 else 1e-11
        assert_logs_agree(ours[row], exact.log_partition, close)


@EXACT_IN_BOTH
def test_log_prob_and_coupling_gain_of_every_completion_are_exact(name, dtype):
    ours = ALL[name].distribution(dtype)
    for row, exact in enumerate(enumerations(name)):
        value = every_completion(ALL[name], row)
        close = tolerance(exact, dtype)
        assert_logs_agree(ours.log_prob(value)[:, row], exact.log_prob, close)
        gain = ours.coupling_gain(value)[:, row]
        possible = (exact.log_factorized > -torch.inf) | (exact.log_circuit > -torch.inf).any(1)
        expected = exact.coupling_gain if exact.positions else torch.zeros(1)
        assert_logs_agree(gain[possible], expected[possible], close)


@EXACT_IN_BOTH
def test_marginals_and_the_latent_posterior_are_the_sums_of_the_joint(name, dtype):
    ours = ALL[name].distribution(dtype)
    assert_probabilities_agree(ours.marginals.sum(-1), torch.ones(ours.masked.shape))
    assert (ours.latent_posterior[~ours.present] == 0).all()
    for row, exact in enumerate(enumerations(name)):
        if exact.positions:
            at, close = (row, exact.positions), tolerance(exact, dtype)
            assert_probabilities_agree(ours.marginals[at], exact.marginals, close)
            if ours.active[row]:
                assert_probabilities_agree(ours.latent_posterior[at], exact.latent_posterior, close)


@EXACT
def test_marginals_of_some_tokens_are_those_of_all_tokens(name):
    ours, close = ALL[name].distribution(), max(1e-5, *(e.rounding for e in enumerations(name)))
    g = torch.Generator().manual_seed(0)
    value = torch.randint(ALL[name].logits.shape[-1], ours.masked.shape, generator=g)
    for tokens in (value, ours.sample(generator=g)):
        expected = ours.marginals.gather(-1, tokens[..., None])[..., 0]
        found = ours.marginal_probs_of(tokens)
        assert_probabilities_agree(found[ours.present], expected[ours.present], close)


@EXACT
def test_logits_given_latents_are_the_distributions_of_the_tokens(name):
    case = ALL[name]
    g = torch.Generator().manual_seed(0)
    latents = torch.randint(len(case.initial), (6, *case.logits.shape[:2]), generator=g)
    logits = case.distribution().logits_given(latents)
    with torch.no_grad():  # written in place
        torch.testing.assert_close(case.distribution().logits_given(latents), logits)
    for row, exact in enumerate(enumerations(name)):
        for sample, path in zip(logits[:, row], latents[:, row], strict=True):
            law = exact.law_given(path)
            if exact.positions and not law.isnan().any():
                close = tolerance(exact, torch.float32)
                assert_probabilities_agree(sample.exp()[exact.positions], law, close)


@EXACT_IN_BOTH
def test_viterbi_is_the_best_pair(name, dtype):
    ours = ALL[name].distribution(dtype)
    best = ours.viterbi()
    assert torch.equal(best.tokens[ours.observed], ours.tokens[ours.observed])
    for row, exact in coupled_rows(name):
        close = tolerance(exact, dtype)
        assert_logs_agree(best.log_prob[row], exact.best, close)
        pair = exact.pair_log_prob(best.tokens[row], best.latents[row])
        assert_logs_agree(pair, exact.best, close)


@EXACT_IN_BOTH
def test_likely_latents_are_the_most_probable_given_the_ones_after_them(name, dtype):
    ours = ALL[name].distribution(dtype)
    latents = ours.likely_latents()
    for row, exact in coupled_rows(name):
        if exact.log_partition == -torch.inf:
            continue
        path, close = latents[row, exact.positions], tolerance(exact, dtype)
        follows = torch.ones_like(exact.path_prob, dtype=torch.bool)
        for place in range(len(path) - 1, -1, -1):
            probs = torch.zeros(int(exact.latents.max()) + 1, dtype=torch.float64)
            probs.index_add_(0, exact.latents[follows, place], exact.path_prob[follows])
            assert_logs_agree(probs[path[place]].log(), probs.max().log(), close)
            follows &= exact.latents[:, place] == path[place]


@pytest.mark.parametrize(
    "name",
    ["absent anywhere", "one-hot evidence by temperature", *AWKWARD, *STRUCTURES, *STRUCTURED],
)
def test_a_row_does_not_depend_on_its_batchmates(name):
    case = ALL[name]
    together = case.distribution()
    for row in range(len(case)):
        alone = case.rows([row]).distribution()
        assert_logs_agree(alone.log_partition, together.log_partition[row : row + 1])
        assert_probabilities_agree(alone.marginals[0], together.marginals[row])
        assert_probabilities_agree(alone.latent_posterior[0], together.latent_posterior[row])


def test_the_order_of_rows_does_not_matter():
    case, order = underflow_case(), [2, 0, 3, 1]
    ours = case.distribution().log_partition[order]
    assert_logs_agree(case.rows(order).distribution().log_partition, ours)


def test_log_prob_of_tokens_that_contradict_the_observed_ones_is_minus_infinity():
    case = random_case(61)
    value = torch.where(case.options["observed"], case.options["tokens"], 0)
    row, position = case.options["observed"].nonzero()[0].tolist()
    value[row, position] = (value[row, position] + 1) % 4
    log_prob = case.distribution().log_prob(value)
    assert log_prob[row] == -torch.inf
    assert log_prob[[r for r in range(3) if r != row]].isfinite().all()


def test_absent_positions_hold_anything_and_sample_dimensions_lead():
    ours = random_case(62, observed="none", present="interior").distribution()
    value = torch.randint(4, (2, 5, 3, 4), generator=torch.Generator().manual_seed(0))
    log_prob = ours.log_prob(torch.where(ours.present, value, -100))
    assert log_prob.shape == (2, 5, 3)
    assert_logs_agree(log_prob[1, 2], ours.log_prob(value[1, 2]))


def test_half_precision_logits_are_worked_on_in_float32():
    ours = random_case(65, dtype=torch.bfloat16).distribution()
    assert ours.log_partition.dtype == ours.marginals.dtype == torch.float32


def test_an_impossible_row_is_reported_by_its_number_and_spoils_nothing():
    ours = impossible_case().distribution()
    assert ours.log_partition[0] == -torch.inf
    assert ours.log_partition[1].isfinite()
    assert not ours.latent_posterior.isnan().any()
    assert_probabilities_agree(ours.marginals[0], ours.logits[0].softmax(-1))
    path = ours.viterbi()
    assert not path.log_prob.isnan().any()
    assert path.log_prob[1].isfinite()
    with pytest.raises(ValueError, match=r"`log_partition` is -inf for rows \[0\].*`with_active`"):
        ours.log_prob(torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("without", ["emissions", "transitions"])
def test_a_row_without_any_possible_path_can_be_left_factorized(without):
    case = random_case(64, batch=1, observed="none")
    spoilt = case.emission if without == "emissions" else case.transition
    spoilt.fill_(-torch.inf)
    ours, value = case.distribution(), torch.tensor([[0, 1, 3, 2]])
    law = case.logits.log_softmax(-1)
    assert ours.log_partition[0] == -torch.inf
    if without == "emissions":  # given an impossible latent, the backbone's distribution
        assert_logs_agree(ours.logits_given(torch.zeros_like(value)), law)
    factorized = ours.with_active(torch.tensor([False]))
    assert_logs_agree(factorized.log_prob(value), law.gather(-1, value[..., None]).sum()[None])
    assert factorized.coupling_gain(value) == 0
    assert torch.equal(factorized.viterbi().tokens, case.logits.argmax(-1))


def test_marginals_are_one_hot_where_observed_and_the_backbones_where_absent_or_inactive():
    case = random_case(72, batch=2, present="interior", active=torch.tensor([False, True]))
    ours, options = case.distribution(), case.options
    seen = options["observed"] & options["present"]
    one_hot = torch.nn.functional.one_hot(options["tokens"], 4).float()
    factorized = torch.where(seen[..., None], one_hot, case.logits.softmax(-1))
    assert_probabilities_agree(ours.factorized_logits.exp(), factorized)
    assert torch.equal(ours.marginals[seen], one_hot[seen])
    assert_probabilities_agree(ours.marginals[0], factorized[0])
    assert_probabilities_agree(ours.marginals[1, 1], factorized[1, 1])


def test_forbidden_tokens_have_no_probability():
    assert (ALL["forbidden token"].distribution().marginals[..., 1] == 0).all()
