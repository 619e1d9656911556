"""A distribution made of a list of tokens: the one of its dense form, and bounds on the exact."""

from dataclasses import replace

import pytest
import torch
from agreement import assert_logs_agree, assert_probabilities_agree
from cases import FORBIDDEN, STRUCTURES, TOP_K, VOCAB, random_case

from codd_hf.circuits import CoupledCategorical, DenseEvidence, TopKEvidence

LISTED = pytest.mark.parametrize("name", TOP_K)


def dense_form(case):
    """The same distribution from the probabilities of all tokens that the list stands for."""
    spread = case.distribution().prediction
    prediction = DenseEvidence(spread.dense(), spread.temperature)
    with_steps = case.distribution()
    options = case.options | {"context": with_steps.context}
    return CoupledCategorical(prediction, case.circuit(), **options)


def values_of(case, number=20):
    g = torch.Generator().manual_seed(0)
    return torch.randint(case.logits.shape[-1], (number, *case.logits.shape[:2]), generator=g)


def assert_same_in_every_query(ours, expected, case):
    values = values_of(case)
    assert_logs_agree(ours.log_partition, expected.log_partition)
    assert_logs_agree(ours.log_prob(values), expected.log_prob(values), 2e-5)
    assert_logs_agree(ours.coupling_gain(values), expected.coupling_gain(values), 2e-5)
    assert_logs_agree(ours.factorized_logits, expected.factorized_logits)
    assert_probabilities_agree(ours.marginals, expected.marginals)
    assert_probabilities_agree(ours.latent_posterior, expected.latent_posterior)
    assert_probabilities_agree(
        ours.marginal_probs_of(values[0]), expected.marginal_probs_of(values[0])
    )
    known = values[1] % 2 == 0
    known &= ours.masked
    assert_logs_agree(
        ours.partial_log_prob(values[0], known), expected.partial_log_prob(values[0], known), 2e-5
    )

    def drawn(distribution):
        generators = [torch.Generator().manual_seed(row) for row in range(len(case))]
        latents = distribution.sample_latents(generators)
        return distribution.sample((50,), generators), latents, distribution.logits_given(latents)

    for mine, theirs in zip(drawn(ours)[:2], drawn(expected)[:2], strict=True):
        assert torch.equal(mine, theirs)
    assert_probabilities_agree(drawn(ours)[2].exp(), drawn(expected)[2].exp())
    best, other = ours.viterbi(), expected.viterbi()
    assert_logs_agree(best.log_prob, other.log_prob)
    assert torch.equal(best.tokens, other.tokens)
    assert torch.equal(best.latents, other.latents)


@LISTED
@pytest.mark.parametrize("gradients", [True, False])
def test_a_list_gives_what_its_dense_form_gives_in_every_query(name, gradients):
    case = TOP_K[name]
    with torch.set_grad_enabled(gradients):  # without, what is listed is added up in products
        assert_same_in_every_query(case.distribution(), dense_form(case), case)


@LISTED
def test_a_list_given_further_tokens_is_its_dense_form_given_them(name):
    case = TOP_K[name]
    tokens = values_of(case)[3]
    further = values_of(case)[4] % 2 == 0
    forbidden = case.options.get("forbidden")
    if forbidden is not None:
        tokens = tokens.masked_fill(forbidden[tokens], 0)
    ours = case.distribution().condition(tokens, further)
    assert_same_in_every_query(ours, dense_form(case).condition(tokens, further), case)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_list_of_all_tokens_is_the_logits(name):
    case = STRUCTURES[name]
    listed = replace(case, top_k=3, log_marginal=torch.randn(1, 3))
    assert_same_in_every_query(listed.distribution(), case.distribution(), case)


def test_a_dense_prediction_is_the_logits():
    case = random_case(400, temperature=0.6, context=1.0)
    prediction = DenseEvidence.from_logits(case.logits, 0.6)
    ours = CoupledCategorical(prediction, case.circuit(), **case.options)
    assert_same_in_every_query(ours, case.distribution(), case)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("held", ["none", "another"])
def test_a_law_of_the_lists_own_goes_before_the_circuits(k, held):
    case = random_case(401, top_k=k, observed="none")
    own = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    circuit = case.circuit() if held == "another" else replace(case.circuit(), log_marginal=None)
    listed = TopKEvidence.from_logits(case.logits, k).spread_by(own)
    ours = CoupledCategorical(listed, circuit, **case.options)
    expected = replace(case, log_marginal=own).distribution()
    assert_same_in_every_query(ours, expected, case)


@pytest.mark.parametrize("rows", [1, 4])
def test_forbidden_tokens_get_nothing_of_the_rest_whatever_the_circuits_law(rows):
    case = random_case(402, top_k=2, observed="none", forbidden=FORBIDDEN)
    law = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))
    circuit = replace(case.circuit(), log_marginal=law.log_softmax(-1))
    ours = CoupledCategorical(case.prediction(), circuit, **case.options)
    allowed = replace(case, log_marginal=law.masked_fill(FORBIDDEN, -torch.inf))
    assert (ours.marginals[..., 1] == 0).all()
    assert_same_in_every_query(ours, allowed.distribution(), case)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_bounds_hold_the_exact_log_partition_of_the_full_prediction(k, untied):
    everything = {"states": 4, "copies": 1.0, "context": 1.0}
    for seed in range(20):
        case = random_case(
            410 + seed, tied_emission=not untied, present="interior", top_k=k, **everything
        )
        lower, upper = case.distribution().log_partition_bounds
        exact = replace(case, top_k=None).distribution().log_partition
        assert (lower <= exact + 1e-5).all()
        assert (exact <= upper + 1e-5).all()
        approximate = case.distribution().log_partition
        assert (lower <= approximate + 1e-5).all()
        assert (approximate <= upper + 1e-5).all()


def test_bounds_close_in_as_the_list_grows():
    gaps = []
    for k in range(1, VOCAB + 1):
        lower, upper = (
            random_case(430, observed="none", top_k=k).distribution().log_partition_bounds
        )
        gaps.append(float((upper - lower).max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-5


def test_bounds_of_exact_evidence_are_the_log_partition():
    ours = random_case(431).distribution()
    assert all(torch.equal(bound, ours.log_partition) for bound in ours.log_partition_bounds)


def test_bounds_hold_where_a_state_emits_nothing_or_everything():
    case = random_case(432, observed="none", top_k=2, batch=6)
    case.emission[:, 0, :2] = -torch.inf
    case.emission[:, 1, 3] = 90.0
    lower, upper = case.distribution().log_partition_bounds
    exact = replace(case, top_k=None).distribution().log_partition
    assert not lower.isnan().any()
    assert (lower <= exact + 1e-4).all()
    assert (exact <= upper + 1e-4).all()


def test_evidence_of_another_temperature_is_an_error_that_gives_both():
    case = random_case(440, top_k=2)
    for listed in (
        TopKEvidence.from_logits(case.logits, 2, 0.5),
        DenseEvidence.from_logits(case.logits, 0.5),
    ):
        with pytest.raises(ValueError, match=r"at temperature 0.5, .* cannot be 1.0"):
            CoupledCategorical(listed, case.circuit())


def test_a_list_without_a_law_for_the_rest_is_an_error_that_says_what_to_call():
    case = random_case(441)
    listed = TopKEvidence.from_logits(case.logits, 2)
    with pytest.raises(ValueError, match=r"no law .* call its `spread_by\(log_marginal\)`"):
        CoupledCategorical(listed, case.circuit())


def test_another_temperature_needs_the_logits():
    ours = random_case(442, top_k=2).distribution()
    assert ours.with_temperature(1.0) is ours
    with pytest.raises(ValueError, match=r"computed at temperature 1.0.* again at 0.5"):
        ours.with_temperature(0.5)


def test_a_list_over_another_vocabulary_does_not_hide_a_wrong_shape():
    case = random_case(443)
    dense = DenseEvidence(torch.zeros(3, 4, VOCAB + 1))
    with pytest.raises(ValueError, match=r"`logits` must have shape \[batch, length, 4\]"):
        CoupledCategorical(dense, case.circuit())


@LISTED
def test_a_row_does_not_depend_on_its_batchmates(name):
    case = TOP_K[name]
    together = case.distribution()
    for row in range(len(case)):
        alone = case.rows([row]).distribution()
        assert_logs_agree(alone.log_partition, together.log_partition[row : row + 1])
        assert_probabilities_agree(alone.marginals[0], together.marginals[row])
        bounds = zip(alone.log_partition_bounds, together.log_partition_bounds, strict=True)
        for mine, theirs in bounds:
            assert_logs_agree(mine, theirs[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [5 * 64 * 4 + 7, 64 * 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_listing_in_slices_equals_a_plain_sort(monkeypatch, dtype, vocab_size, temperature):
    monkeypatch.setattr("codd_hf.circuits.evidence.listing.SLICE_IN_CACHE", 3 * vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 30 * torch.randn(2, 4, vocab_size, generator=generator)
    logits[0, 0, :4] += 300  # the rest is far below what is listed
    logits[0, 1] = -torch.inf
    logits[0, 2, 7:] = -torch.inf
    logits = logits.to(dtype)
    forbidden = torch.zeros(vocab_size, dtype=torch.bool)
    forbidden[logits[1, 1].topk(3).indices] = True
    forbidden[-1] = True

    k = 4
    kept = TopKEvidence.from_logits(logits, k, temperature, forbidden)

    law = (logits.double() / temperature).masked_fill(forbidden, -torch.inf).log_softmax(-1)
    law[0, 1] = -torch.inf
    expected, order = law.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(kept.log_probs.double(), expected[..., :k], atol=1e-4, rtol=1e-5)
    rest = expected[..., k:].logsumexp(-1)
    torch.testing.assert_close(kept.log_rest.double(), rest, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(law.gather(-1, kept.indices), expected[..., :k])
    assert (kept.indices.sort(dim=-1).values.diff(dim=-1) > 0).all()
    if dtype == torch.float64:
        assert (kept.indices[1] == order[1, :, :k]).all()
