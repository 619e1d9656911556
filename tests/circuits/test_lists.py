"""Lists: what they stand for, and the distribution they make."""

from dataclasses import replace

import pytest
import torch
from agreement import assert_logs_agree, assert_probabilities_agree
from cases import FORBIDDEN, STRUCTURES, TOP_K, VOCAB, random_case
from test_evidence import BATCH, BY_KIND, LENGTH, POSITIONS, emission_of, flat, logits_of, plain
from test_evidence import VOCAB as TOKENS

from codd_hf.circuits import (
    CoupledCategorical,
    DenseEmission,
    DenseEvidence,
    ListedEvidence,
    TokenGroups,
)
from codd_hf.circuits.evidence.dense import log_probs_given
from codd_hf.circuits.evidence.lists import SMALLEST_PART

LISTED = pytest.mark.parametrize("name", TOP_K)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups_of(emission, forbidden=None, seed=2):
    """By state where the emission is the same at all positions; else one group."""
    marginal = normal(emission.vocab_size, seed=seed)
    if forbidden is not None:
        marginal = marginal.masked_fill(forbidden, -torch.inf)
    return TokenGroups.by_state(marginal.log_softmax(-1), emission)


@BY_KIND
@pytest.mark.parametrize("k", [1, 3, TOKENS - 1, TOKENS])
@pytest.mark.parametrize("gradients", [True, False])
def test_each_group_keeps_its_mass_and_spreads_it_by_the_marginal(kind, k, gradients, monkeypatch):
    monkeypatch.setattr("codd_hf.circuits.evidence.dense.SLICE_IN_CACHE", 2 * BATCH * LENGTH * k)
    emission, forbidden = emission_of(kind), (torch.arange(TOKENS) % 5 == 2)
    groups = groups_of(emission, forbidden)
    assert groups.number == (1 if kind == "dense, untied" else 5)
    exact = DenseEvidence.from_logits(logits_of(), 0.8, forbidden).dense().exp()
    group = torch.zeros(TOKENS) if groups.index is None else emission.dense()[0].argmax(0)
    with torch.set_grad_enabled(gradients):
        logits = logits_of().requires_grad_(gradients)
        listed = ListedEvidence.from_logits(logits, k, 0.8, forbidden, groups)
        found = listed.dense().detach().exp()
        evidence = flat(listed).soft_evidence(emission, POSITIONS)
    torch.testing.assert_close(found.sum(-1), torch.ones(BATCH, LENGTH))
    assert_logs_agree(evidence.detach(), plain(emission, found.log()).flatten(0, 1), 1e-4)
    tokens = torch.arange(TOKENS)[:, None, None].expand(-1, BATCH, LENGTH)
    assert_logs_agree(listed.log_prob_of(tokens).movedim(0, -1).detach(), found.log())
    for b, i in ((0, 0), (2, 3)):
        rest = torch.ones(TOKENS, dtype=torch.bool)
        rest[exact[b, i].topk(k).indices] = False
        torch.testing.assert_close(found[b, i, ~rest], exact[b, i, ~rest])
        for c in group.unique():
            part = rest & (group == c)
            share = groups.log_marginal[part].softmax(0)
            if part.any() and share.isfinite().all():
                mass = exact[b, i, part].sum()
                torch.testing.assert_close(found[b, i, part], mass * share, rtol=1e-4, atol=1e-6)


@BY_KIND
@pytest.mark.parametrize("samples", [(), (2,)])
@torch.no_grad()
def test_tokens_given_latents_are_a_sum_however_few_rows_are_made_at_once(
    kind, samples, monkeypatch
):
    monkeypatch.setattr("codd_hf.circuits.evidence.dense.SLICE_IN_CACHE", 5 * TOKENS)
    emission, forbidden = emission_of(kind), torch.arange(TOKENS) == 4
    latents = torch.randint(5, (*samples, BATCH, LENGTH))
    total = torch.randn(*samples, BATCH, LENGTH)
    predictions = [DenseEvidence.from_logits(logits_of(), forbidden=forbidden)]
    for k in (1, 3, TOKENS):
        groups = groups_of(emission, forbidden)
        predictions.append(ListedEvidence.from_logits(logits_of(), k, 1.0, forbidden, groups))
    for prediction in predictions:
        rows = emission.rows(latents, torch.arange(LENGTH))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = log_probs_given(prediction, emission, latents, total)
        assert (found[..., 4] == -torch.inf).all()
        torch.testing.assert_close(found, prediction.dense() + rows - total[..., None])


def test_no_token_that_the_marginal_allows_is_ruled_out():
    emission = DenseEmission(normal(1, 5, 40, seed=1, scale=2.0))
    groups, logits = groups_of(emission), normal(6, 40, scale=3.0)
    logits[:, groups.index == 2] = -300.0  # underflows beside the others
    logits[:, groups.index == 3] = -torch.inf
    found = ListedEvidence.from_logits(logits, 3, groups=groups).dense()
    assert (found > -torch.inf).all()
    assert found[:, (groups.index == 2) | (groups.index == 3)].exp().sum() < 1e-5


@torch.no_grad()
def test_where_nearly_all_of_a_group_is_listed_evidence_stays_accurate():
    emission = DenseEmission(normal(1, 5, 40, seed=1, scale=2.0))
    marginal, logits = normal(40, seed=2), normal(6, 40)
    group = TokenGroups.by_state(marginal, emission).index == 1
    first = int(group.nonzero()[0])
    marginal[first] = 10.0  # the rest of its group has far less than `SMALLEST_PART`
    logits[:, first] = 9.0
    groups = TokenGroups.by_state(marginal.log_softmax(-1), emission)
    others = groups.log_marginal[group].exp().sort().values[:-1]
    assert 0 < others.sum() < SMALLEST_PART * groups.mass[1]
    listed = ListedEvidence.from_logits(logits, 2, groups=groups)
    torch.testing.assert_close(listed.dense().exp().sum(-1), torch.ones(6), rtol=1e-4, atol=0)
    where = torch.zeros(6, dtype=torch.long)
    expected = DenseEvidence(listed.dense()).soft_evidence(emission, where)
    assert_logs_agree(listed.soft_evidence(emission, where), expected, 1e-4)


def test_a_rest_with_nothing_to_be_spread_over_is_dropped():
    logits, marginal = logits_of(), torch.full((TOKENS,), -torch.inf)
    marginal[logits[0, 0].argmax()] = 0.0
    listed = ListedEvidence.from_logits(logits, 1).spread(TokenGroups(marginal))
    assert listed[:1, :1].dense().exp().count_nonzero() == 1


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4, 16])
def test_groups_bring_evidence_closer_to_that_of_all_tokens(k):
    """Where states have their own kinds of tokens, and predictions favour some of these kinds."""
    kinds = torch.arange(40) % 5
    frequency, others = normal(1, 1, 40, seed=2), 3.0 * (kinds != torch.arange(5)[:, None])
    emission = DenseEmission(frequency - others + normal(1, 5, 40, seed=3, scale=0.3))
    logits = normal(6, 5, scale=2.0)[:, kinds] + normal(6, 40, seed=4)
    where = torch.zeros(6, dtype=torch.long)
    expected = DenseEvidence.from_logits(logits).soft_evidence(emission, where).softmax(-1)
    by_state = TokenGroups.by_state(frequency[0, 0].log_softmax(-1), emission)

    def error(groups):
        listed = ListedEvidence.from_logits(logits, k, groups=groups)
        return (listed.soft_evidence(emission, where).softmax(-1) - expected).abs().sum(-1).mean()

    assert error(by_state) < 0.5 * error(replace(by_state, index=None))


@BY_KIND
@pytest.mark.parametrize("k", [1, 3, TOKENS])
def test_gradients_are_those_of_finite_differences(kind, k):
    emission = emission_of(kind, dtype=torch.float64)
    leaves = [leaf.detach().requires_grad_() for leaf in emission.tensors()]
    fixed = groups_of(emission)

    def function(logits, *leaves):
        emitted = type(emission)(*leaves)
        groups = TokenGroups(fixed.log_marginal.double(), fixed.index, emitted)
        listed = flat(ListedEvidence.from_logits(logits, k, 0.9, groups=groups))
        return listed.soft_evidence(emitted, POSITIONS)

    logits = logits_of(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (logits, *leaves), fast_mode=True)


@BY_KIND
def test_impossible_and_underflowing_tokens_have_finite_gradients(kind):
    emission = emission_of(kind, impossible=True)
    leaves = [leaf.detach().requires_grad_() for leaf in emission.tensors()]
    logits = logits_of()
    logits[0, 0, 3:] = -torch.inf
    logits[1] = -torch.inf
    listed = ListedEvidence.from_logits(logits.requires_grad_(), 3, groups=groups_of(emission))
    found = flat(listed).soft_evidence(type(emission)(*leaves), POSITIONS)
    assert_logs_agree(found, plain(emission, listed.dense()).flatten(0, 1), 1e-4)
    found[found > -torch.inf].sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (logits, *leaves))


@pytest.mark.parametrize("shape", [(0,), (), (2, 3)])
@pytest.mark.parametrize("vocab", [40, 2048, 2050])
def test_lists_are_made_of_any_shape_of_predictions(shape, vocab):
    logits, emission = normal(*shape, vocab), DenseEmission(normal(1, 5, vocab))
    listed = ListedEvidence.from_logits(logits, 3, groups=groups_of(emission))
    assert listed.indices.shape == (*shape, 3)
    assert listed.log_rest.shape == (*shape, 5)
    assert listed.shape == (*shape, -1)
    assert listed.dense().shape == (*shape, vocab)
    torch.testing.assert_close(listed.log_probs.exp(), logits.softmax(-1).topk(3, -1).values)
    if shape == (0,):
        none = torch.zeros(0, dtype=torch.long)
        assert listed.soft_evidence(emission, none).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "temperature"), [(1287, 1.0), (6400, 0.7)])
def test_listing_in_slices_equals_a_plain_sort(monkeypatch, dtype, vocab_size, temperature):
    monkeypatch.setattr("codd_hf.circuits.evidence.dense.SLICE_IN_CACHE", 3 * vocab_size)
    logits = normal(2, 4, vocab_size, scale=30)
    logits[0, 0, :4] += 300  # the rest is far below what is listed
    logits[0, 1] = -torch.inf
    logits[0, 2, 7:] = -torch.inf
    logits[0, 3, 0] += 1000  # the rest is tiny, and keeps its digits
    logits = logits.to(dtype)
    forbidden = torch.zeros(vocab_size, dtype=torch.bool)
    forbidden[logits[1, 1].topk(3).indices] = True
    forbidden[-1] = True
    kept = ListedEvidence.from_logits(logits, 4, temperature, forbidden)
    probs = (logits.double() / temperature).masked_fill(forbidden, -torch.inf).log_softmax(-1)
    probs[0, 1] = -torch.inf
    expected = probs.sort(dim=-1, descending=True, stable=True).values
    close = {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(kept.log_probs.double(), expected[..., :4], **close)
    rest = expected[..., 4:].logsumexp(-1, keepdim=True)
    torch.testing.assert_close(kept.log_rest.double(), rest, **close)
    torch.testing.assert_close(probs.gather(-1, kept.indices), expected[..., :4])
    assert (kept.indices.sort(dim=-1).values.diff(dim=-1) > 0).all()


def test_bad_lists_are_refused_and_nan_is_not_taken_for_impossible():
    with pytest.raises(ValueError, match="`k` must be in"):
        ListedEvidence.from_logits(logits_of(), TOKENS + 1)
    with pytest.raises(ValueError, match="call `spread`"):
        ListedEvidence.from_logits(logits_of(), 2).dense()
    logits, emission = logits_of(), emission_of("dense")
    logits[0, 0, 0] = torch.nan
    listed = ListedEvidence.from_logits(logits, 3, groups=groups_of(emission))
    for prediction in (DenseEvidence.from_logits(logits), listed):
        found = flat(prediction).soft_evidence(emission, POSITIONS)
        assert found[0].isnan().all()


def dense_form(case):
    """The same distribution from the probabilities of all tokens that the list stands for."""
    listed = case.distribution()
    prediction = DenseEvidence(listed.prediction.dense(), listed.prediction.temperature)
    options = case.options | {"context": listed.context}
    return CoupledCategorical(prediction, case.circuit(), **options)


def values_of(case, number=20):
    g = torch.Generator().manual_seed(0)
    return torch.randint(case.logits.shape[-1], (number, *case.logits.shape[:2]), generator=g)


def assert_same_in_every_query(ours, expected, case):
    values = values_of(case)
    known = (values[1] % 2 == 0) & ours.masked
    for query, close in (
        (lambda d: d.log_partition, 1e-5),
        (lambda d: d.log_prob(values), 2e-5),
        (lambda d: d.coupling_gain(values), 2e-5),
        (lambda d: d.factorized_logits, 1e-5),
        (lambda d: d.partial_log_prob(values[0], known), 2e-5),
        (lambda d: d.viterbi().log_prob, 1e-5),
    ):
        assert_logs_agree(query(ours), query(expected), close)

    def generators():
        return [torch.Generator().manual_seed(row) for row in range(len(case))]

    latents = ours.sample_latents(generators())
    for query in (
        lambda d: d.marginals,
        lambda d: d.latent_posterior,
        lambda d: d.marginal_probs_of(values[0]),
        lambda d: d.logits_given(latents).exp(),
    ):
        assert_probabilities_agree(query(ours), query(expected))
    for query in (
        lambda d: d.sample((50,), generators()),
        lambda d: d.sample_latents(generators()),
        lambda d: d.viterbi().tokens,
        lambda d: d.viterbi().latents,
    ):
        assert torch.equal(query(ours), query(expected))


@LISTED
@pytest.mark.parametrize("gradients", [True, False])
def test_a_list_gives_what_its_dense_form_gives_in_every_query(name, gradients):
    case = TOP_K[name]
    tokens, further = values_of(case)[3], values_of(case)[4] % 2 == 0
    if (forbidden := case.options.get("forbidden")) is not None:
        tokens = tokens.masked_fill(forbidden[tokens], 0)
    with torch.set_grad_enabled(gradients):
        ours, expected = case.distribution(), dense_form(case)
        assert_same_in_every_query(ours, expected, case)
        given = (d.condition(tokens, further) for d in (ours, expected))
        assert_same_in_every_query(*given, case)


@pytest.mark.parametrize("name", [*list(STRUCTURES)[::3], "a dense prediction"])
def test_a_list_of_all_tokens_and_a_dense_prediction_are_the_logits(name):
    if name in STRUCTURES:
        case = STRUCTURES[name]
        ours = replace(case, top_k=3, log_marginal=torch.randn(3)).distribution()
    else:
        case = random_case(400, temperature=0.6, context=1.0)
        prediction = DenseEvidence.from_logits(case.logits, 0.6)
        ours = CoupledCategorical(prediction, case.circuit(), **case.options)
    assert_same_in_every_query(ours, case.distribution(), case)


@pytest.mark.parametrize("listed", [True, False])
def test_forbidden_tokens_get_nothing_of_the_rest_whatever_the_marginal(listed):
    case = random_case(402, top_k=2, observed="none", forbidden=FORBIDDEN)
    marginal = normal(VOCAB)
    circuit = replace(case.circuit(), log_marginal=marginal.log_softmax(-1))
    given = (case.prediction(), {}) if listed else (case.logits, {"top_k": 2})
    ours = CoupledCategorical(given[0], circuit, **case.options, **given[1])
    allowed = marginal.masked_fill(FORBIDDEN, -torch.inf)
    expected = replace(case, log_marginal=allowed, grouped=not listed)
    assert (ours.marginals[..., 1] == 0).all()
    assert_same_in_every_query(ours, expected.distribution(), case)


def test_tokens_taken_out_get_nothing_of_the_rest():
    case = random_case(403, vocab=6, observed="none", top_k=2)
    ours = CoupledCategorical(case.logits, case.circuit(), top_k=2)
    assert (ours.without(torch.tensor([3])).marginals[..., 3] == 0).all()


def test_evidence_that_does_not_fit_the_distribution_is_an_error_that_says_why():
    case = random_case(440)
    listed, dense = (kind.from_logits for kind in (ListedEvidence, DenseEvidence))
    for evidence in (listed(case.logits, 2, 0.5), dense(case.logits, 0.5)):
        with pytest.raises(ValueError, match=r"at temperature 0.5, .* cannot be 1.0"):
            CoupledCategorical(evidence, case.circuit())
    for given in ((listed(case.logits, 2),), (case.logits,)):
        with pytest.raises(ValueError, match="give the potentials a `log_marginal`"):
            CoupledCategorical(*given, case.circuit(), top_k=2)
    with pytest.raises(ValueError, match=r"`logits` must have shape \[batch, length, 4\]"):
        CoupledCategorical(DenseEvidence(torch.zeros(3, 4, VOCAB + 1)), case.circuit())
    ours = random_case(442, top_k=2).distribution()
    assert ours.with_temperature(1.0) is ours
    with pytest.raises(ValueError, match=r"computed at temperature 1.0.* again at 0.5"):
        ours.with_temperature(0.5)


@LISTED
def test_a_row_does_not_depend_on_its_batchmates(name):
    case = TOP_K[name]
    together = case.distribution()
    for row in range(len(case)):
        alone = case.rows([row]).distribution()
        assert_logs_agree(alone.log_partition, together.log_partition[row : row + 1])
        assert_probabilities_agree(alone.marginals[0], together.marginals[row])
