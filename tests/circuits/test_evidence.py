"""Evidence, exact and from a list of tokens, against its definition in float64."""

import pytest
import torch
from agreement import assert_logs_agree

from codd_hf.circuits import best as best_module
from codd_hf.circuits.best import best_evidence
from codd_hf.circuits.evidence import dense as evidence_module
from codd_hf.circuits.evidence.dense import (
    DenseEvidence,
    emission_of_latents,
    hard_evidence,
    mix_tokens,
    summarise,
    with_factors,
)
from codd_hf.circuits.evidence.lists import TopKEvidence
from codd_hf.circuits.potentials.emissions import DenseEmission, TiedEmission

BATCH, LENGTH, LATENTS, VOCAB = 3, 4, 5, 11
KINDS = ["dense", "dense, untied", "dense, by token", "tied"]
POSITIONS = torch.arange(LENGTH).repeat(BATCH)


def emission_of(kind, seed=0, dtype=torch.float32, impossible=False):
    draw = torch.Generator().manual_seed(seed)
    if kind == "tied":
        sizes = ((LATENTS, 3), (VOCAB, 3), (VOCAB,))
        return TiedEmission(*(torch.randn(s, generator=draw).to(dtype) for s in sizes))
    held = LENGTH if kind == "dense, untied" else 1
    matrix = torch.randn(held, LATENTS, VOCAB, generator=draw).to(dtype)
    if impossible:
        matrix[:, 1] = -torch.inf
        matrix[:, :, 2] = -torch.inf
    if kind == "dense, by token":
        matrix = matrix.transpose(1, 2).contiguous().transpose(1, 2)
    return DenseEmission(matrix)


def logits_of(seed=1, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(BATCH, LENGTH, VOCAB, generator=draw).to(dtype)


def marginal_of(rows, seed=2):
    draw = torch.Generator().manual_seed(seed)
    marginal = torch.randn(rows, VOCAB, generator=draw).log_softmax(-1)
    return marginal[0] if rows == 1 else marginal


def plain(emission, log_probs):
    """`log sum_v phi(v) E_i(z, v)`, `[B, L, H]`, as it is written."""
    matrix = emission.dense().double().exp().expand(LENGTH, -1, -1)
    return torch.einsum("blv,lhv->blh", log_probs.double().exp(), matrix).log()


def flat(prediction):
    rows = torch.arange(BATCH).repeat_interleave(LENGTH)
    return prediction[rows, POSITIONS]


def soft(prediction, emission, **options):
    found = flat(prediction).soft_evidence(emission, POSITIONS, **options)
    return found.view(BATCH, LENGTH, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impossible", [False, True])
def test_exact_evidence_is_the_sum_over_the_vocabulary(kind, impossible):
    emission = emission_of(kind, impossible=impossible)
    prediction = DenseEvidence.from_logits(logits_of(), temperature=0.7)
    expected = plain(emission, (logits_of() / 0.7).log_softmax(-1))
    for options in ({}, {"repair": False}, {"summary": summarise(emission)}):
        assert_logs_agree(soft(prediction, emission, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_that_are_held_change_nothing(kind):
    emission, prediction = emission_of(kind), DenseEvidence.from_logits(logits_of())
    if emission.num_positions > 1:
        pytest.skip("held for tied emissions only")
    made = summarise(emission)
    held = with_factors(made, emission)
    found = [soft(prediction, emission, summary=summary) for summary in (made, held)]
    assert torch.equal(*found)
    log_phi, weights = flat(prediction).dense(), found[0].flatten(0, 1)
    laws = [mix_tokens(emission, log_phi, weights, POSITIONS, s) for s in (made, held)]
    assert torch.equal(*laws)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_evidence_in_chunks_is_the_same_and_so_are_its_gradients(kind, monkeypatch):
    def run():
        emission = emission_of(kind, dtype=torch.float64)
        for leaf in vars(emission).values():
            leaf.requires_grad_()
        logits = logits_of(dtype=torch.float64).requires_grad_()
        prediction = DenseEvidence.from_logits(logits)
        found = soft(prediction, emission)
        leaves = [logits, *vars(emission).values()]
        gradients = torch.autograd.grad(found.square().sum(), leaves)
        mixed = mix_tokens(emission, flat(prediction).dense(), found.flatten(0, 1), POSITIONS)
        best = best_evidence(emission, flat(prediction).dense(), POSITIONS)
        return found, *gradients, mixed, best

    whole = run()
    monkeypatch.setattr(evidence_module, "ONE_PRODUCT", 0)
    monkeypatch.setattr(evidence_module, "ELEMENTS_AT_ONCE", 3 * LATENTS)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_float32_under_autocast_and_with_half_precision_weights(kind):
    emission = emission_of(kind, dtype=torch.bfloat16)
    exact = type(emission)(*(tensor.double() for tensor in vars(emission).values()))
    expected = plain(exact, logits_of().log_softmax(-1))
    dense = DenseEvidence.from_logits(logits_of())
    listed = TopKEvidence.from_logits(logits_of(), VOCAB)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for prediction in (dense, listed):
            found = soft(prediction, emission)
            assert found.dtype == torch.float32
            # A tied emission's own product is in the precision of its weights.
            assert_logs_agree(found, expected, 5e-2 if kind == "tied" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_that_underflows_is_repaired(kind):
    emission = emission_of(kind)
    matrix = emission.dense().clone()
    matrix[:, 0, 0] = 200.0
    emission = DenseEmission(matrix)
    logits = logits_of()
    logits[..., 0] = -torch.inf
    prediction = DenseEvidence.from_logits(logits)
    expected = plain(emission, prediction.log_probs)
    assert summarise(emission).needs_repair
    assert not summarise(emission_of(kind)).needs_repair
    assert_logs_agree(soft(prediction, emission), expected)
    assert (soft(prediction, emission, repair=False)[..., 0] < expected[..., 0]).all()
    listed = TopKEvidence.from_logits(logits, VOCAB)
    assert_logs_agree(soft(listed, emission, repair=False), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_list_of_all_tokens_is_exact(kind, impossible, temperature):
    emission = emission_of(kind, impossible=impossible)
    logits = logits_of()
    logits[0, 0, 3:] = -torch.inf
    logits[1] = -torch.inf
    forbidden = torch.arange(VOCAB) == 4
    whole = DenseEvidence.from_logits(logits, temperature, forbidden)
    listed = TopKEvidence.from_logits(logits, VOCAB, temperature, forbidden)
    assert (listed.log_rest == -torch.inf).all()
    expected = plain(emission, whole.log_probs)
    assert_logs_agree(soft(whole, emission), expected)
    assert_logs_agree(soft(listed, emission), expected)
    listed = listed.spread_by(marginal_of(1), forbidden)
    assert_logs_agree(listed.dense(), whole.dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, LENGTH])
@pytest.mark.parametrize("k", [1, 3, VOCAB - 1])
def test_the_rest_is_spread_in_proportion_to_the_marginal(kind, rows, k):
    emission = emission_of(kind)
    forbidden = torch.tensor([2, 7])
    flags = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, forbidden, True)
    whole = DenseEvidence.from_logits(logits_of(), 0.8, flags)
    listed = TopKEvidence.from_logits(logits_of(), k, 0.8, flags).spread_by(
        marginal_of(rows), flags
    )

    marginal = marginal_of(rows).double().exp().expand(BATCH, LENGTH, -1).clone()
    marginal[..., forbidden] = 0
    marginal.scatter_(-1, listed.indices, 0)
    mass = whole.log_probs.double().exp()
    rest = 1 - mass.gather(-1, listed.indices).sum(-1, keepdim=True)
    total = marginal.sum(-1, keepdim=True)
    spread = rest * marginal / total.masked_fill(total == 0, 1)
    spread.scatter_(-1, listed.indices, mass.gather(-1, listed.indices))
    found = listed.dense()
    torch.testing.assert_close(found.double().exp(), spread, rtol=1e-4, atol=1e-7)
    assert (found[..., forbidden] == -torch.inf).all()

    expected = plain(emission, found)
    summary = summarise(emission, listed.log_marginal)
    assert_logs_agree(soft(listed, emission), expected, 1e-4)
    assert_logs_agree(soft(listed, emission, summary=summary, repair=False), expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, LENGTH])
@pytest.mark.parametrize("k", [1, 3, VOCAB])
@torch.no_grad()
def test_without_gradients_a_list_adds_up_to_the_same(kind, rows, k, monkeypatch):
    monkeypatch.setattr("codd_hf.circuits.evidence.listing.SLICE_IN_CACHE", 2 * BATCH * LENGTH * k)
    emission = emission_of(kind)
    listed = TopKEvidence.from_logits(logits_of(), k).spread_by(marginal_of(rows))
    expected = plain(emission, listed.dense())
    summary = summarise(emission, listed.log_marginal)
    assert_logs_agree(soft(listed, emission, summary=summary), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, LENGTH])
@pytest.mark.parametrize("k", [None, 1, 3, VOCAB])
@pytest.mark.parametrize("samples", [(), (2,)])
@torch.no_grad()
def test_what_is_given_latents_is_a_sum_however_few_rows_are_made_at_once(
    kind, rows, k, samples, monkeypatch
):
    monkeypatch.setattr("codd_hf.circuits.evidence.listing.SLICE_IN_CACHE", 5 * VOCAB)
    emission = emission_of(kind)
    latents = torch.randint(LATENTS, (*samples, BATCH, LENGTH))
    total = torch.randn(*samples, BATCH, LENGTH)
    forbidden = torch.arange(VOCAB) == 4
    if k is None:
        prediction = DenseEvidence.from_logits(logits_of(), forbidden=forbidden)
    else:
        prediction = TopKEvidence.from_logits(logits_of(), k, forbidden=forbidden)
        prediction = prediction.spread_by(marginal_of(rows), forbidden)
    expected = prediction.dense() + emission_of_latents(emission, latents) - total[..., None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prediction.given_latents(emission, latents, total)
    assert (found[..., 4] == -torch.inf).all()
    torch.testing.assert_close(found, expected)


def test_a_rest_with_nothing_to_be_spread_over_is_dropped():
    marginal = torch.full((VOCAB,), -torch.inf)
    logits = logits_of()
    marginal[logits[0, 0].argmax()] = 0.0
    listed = TopKEvidence.from_logits(logits, 1).spread_by(marginal)[:1, :1]
    assert listed.dense().exp().count_nonzero() == 1
    emission = emission_of("dense")
    found = listed[0].soft_evidence(emission, torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(
        found, emission.columns(listed.indices[0], None)[:, 0] + listed.log_probs[0]
    )


def test_the_remaining_mass_keeps_its_digits_when_it_is_tiny():
    logits = torch.tensor([[0.0, -30.0, -31.0, -40.0]])
    rest = TopKEvidence.from_logits(logits, 1).log_rest
    assert_logs_agree(rest, logits.double()[:, 1:].logsumexp(-1), 1e-6)


@pytest.mark.parametrize("samples", [(), (2,), (2, 3)])
@pytest.mark.parametrize("rows", [1, LENGTH])
def test_log_prob_of_tokens_is_read_from_the_dense_prediction(samples, rows):
    tokens = torch.randint(VOCAB, (*samples, BATCH, LENGTH))
    whole = DenseEvidence.from_logits(logits_of())
    listed = TopKEvidence.from_logits(logits_of(), 3).spread_by(marginal_of(rows))
    for prediction in (whole, listed):
        assert prediction.batch_shape == (BATCH, LENGTH)
        dense = prediction.dense().expand(*samples, -1, -1, -1)
        expected = dense.gather(-1, tokens[..., None])[..., 0]
        assert_logs_agree(prediction.log_prob_of(tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, VOCAB])
def test_bounds_hold_however_the_rest_is_spread(kind, k):
    emission = emission_of(kind)
    listed = TopKEvidence.from_logits(logits_of(), k)
    lower, upper = flat(listed).soft_evidence_bounds(emission, POSITIONS)
    rest = listed.log_rest[..., None]
    for seed in range(20):
        concentrated = torch.randn(BATCH, LENGTH, VOCAB, generator=torch.manual_seed(seed)) * seed
        spread = concentrated.scatter(-1, listed.indices, -torch.inf)
        spread = spread - spread.logsumexp(-1, keepdim=True).clamp(min=-1e9) + rest
        truth = plain(emission, spread.scatter(-1, listed.indices, listed.log_probs))
        truth = truth.flatten(0, 1)
        assert (lower.double() <= truth + 1e-5).all()
        assert (truth <= upper.double() + 1e-5).all()
    if k == VOCAB:
        torch.testing.assert_close(lower, upper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 1, 3, VOCAB])
def test_gradients_are_those_of_finite_differences(kind, k):
    emission = emission_of(kind, dtype=torch.float64)
    leaves = [leaf.detach().requires_grad_() for leaf in vars(emission).values()]
    logits = logits_of(dtype=torch.float64).requires_grad_()
    marginal = marginal_of(LENGTH).double()

    def function(logits, *leaves):
        if k is None:
            prediction = DenseEvidence.from_logits(logits, 0.9)
        else:
            prediction = TopKEvidence.from_logits(logits, k, 0.9).spread_by(marginal)
        return soft(prediction, type(emission)(*leaves))

    assert torch.autograd.gradcheck(function, (logits, *leaves))


@pytest.mark.parametrize("k", [None, 1, 3, VOCAB])
def test_gradients_are_finite_where_things_are_impossible(k):
    matrix = emission_of("dense", impossible=True).log_potential.requires_grad_()
    logits = logits_of()
    logits[0, 0, 3:] = -torch.inf
    logits[1] = -torch.inf
    logits.requires_grad_()
    if k is None:
        prediction = DenseEvidence.from_logits(logits)
    else:
        prediction = TopKEvidence.from_logits(logits, k).spread_by(marginal_of(1))
    found = soft(prediction, DenseEmission(matrix))
    assert not found.isnan().any()
    found[found > -torch.inf].sum().backward()
    assert matrix.grad.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_hard_evidence_and_emission_of_latents_are_columns_and_rows(kind):
    emission = emission_of(kind)
    matrix = emission.dense().expand(LENGTH, -1, -1)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    latents = torch.randint(LATENTS, (BATCH, LENGTH))
    hard, rows = hard_evidence(emission, tokens), emission_of_latents(emission, latents)
    for b in range(BATCH):
        for i in range(LENGTH):
            torch.testing.assert_close(hard[b, i], matrix[i, :, tokens[b, i]])
            torch.testing.assert_close(rows[b, i], matrix[i, latents[b, i]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [False, True])
def test_mixed_tokens_are_the_backbones_times_the_mixed_emissions(kind, lost):
    emission = emission_of(kind)
    if lost:  # what the backbone allows is emitted by no state that carries weight in float32
        matrix = emission.dense().clone()
        matrix[:, :, 0] += 300
        emission = DenseEmission(matrix)
    logits = logits_of()
    logits[..., 0] = -torch.inf
    log_phi = flat(DenseEvidence.from_logits(logits)).dense()
    weights = torch.randn(len(log_phi), LATENTS)
    scores = emission.dense().double()[POSITIONS if kind == "dense, untied" else POSITIONS * 0]
    law = (scores + weights[..., None] + log_phi[:, None]).exp().sum(1)
    found = mix_tokens(emission, log_phi, weights, POSITIONS)
    torch.testing.assert_close(found.double(), law / law.sum(-1, keepdim=True), rtol=1e-4, atol=0)
    best = (scores + log_phi[:, None]).amax(-1)
    torch.testing.assert_close(best_evidence(emission, log_phi, POSITIONS).double(), best)


def test_no_predictions_give_no_evidence():
    none = torch.empty(0, dtype=torch.long)
    for kind in KINDS:
        emission = emission_of(kind)
        listed = TopKEvidence.from_logits(logits_of(), 3).spread_by(marginal_of(1))
        for prediction in (DenseEvidence.from_logits(logits_of()), listed):
            found = prediction[none, none].soft_evidence(emission, none)
            assert found.shape == (0, LATENTS)


@pytest.mark.parametrize("repair", [False, True])
def test_nan_logits_are_not_taken_for_impossible_tokens(repair):
    logits = logits_of()
    logits[0, 0, 0] = torch.nan
    emission = emission_of("dense")
    listed = TopKEvidence.from_logits(logits, 3).spread_by(marginal_of(1))
    for prediction in (DenseEvidence.from_logits(logits), listed):
        assert soft(prediction, emission, repair=repair)[0, 0].isnan().all()


def test_bad_lists_are_refused():
    with pytest.raises(ValueError, match="`k` must be in"):
        TopKEvidence.from_logits(logits_of(), VOCAB + 1)
    with pytest.raises(ValueError, match="spread_by"):
        TopKEvidence.from_logits(logits_of(), 2).dense()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1, 2, VOCAB])
@pytest.mark.parametrize("impossible", [False, True])
def test_the_best_token_is_found_however_short_the_first_list(kind, first, impossible, monkeypatch):
    monkeypatch.setattr(best_module, "FIRST_LIST", first)
    monkeypatch.setattr(best_module, "ELEMENTS_AT_ONCE", 3 * LATENTS)
    emission = emission_of(kind, impossible=impossible)
    log_phi = flat(DenseEvidence.from_logits(3 * logits_of())).dense()
    scores = emission.dense()[POSITIONS if kind == "dense, untied" else POSITIONS * 0]
    expected = (scores + log_phi[:, None]).amax(-1)
    found = best_evidence(emission, log_phi, POSITIONS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (scores + log_phi[:, None]).argmax(-1).unique().numel() > 1
