"""Exact evidence against its definition in float64."""

import pytest
import torch
from agreement import assert_logs_agree

from codd_hf.circuits import DenseEmission, DenseEvidence, TiedEmission
from codd_hf.circuits.evidence.dense import best_evidence, mix_tokens

BATCH, LENGTH, LATENTS, VOCAB = 3, 4, 5, 11
KINDS = ["dense", "dense, untied", "dense, by token", "tied"]
POSITIONS = torch.arange(LENGTH).repeat(BATCH)
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def emission_of(kind, dtype=torch.float32, impossible=False):
    draw = torch.Generator().manual_seed(0)
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


def logits_of(dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    return 2 * torch.randn(BATCH, LENGTH, VOCAB, generator=draw).to(dtype)


def plain(emission, log_probs):
    """`log sum_v phi(v) E_i(z, v)`, `[B, L, H]`, as it is written."""
    matrix = emission.dense().double().exp().expand(LENGTH, -1, -1)
    return torch.einsum("blv,lhv->blh", log_probs.double().exp(), matrix).log()


def flat(prediction):
    return prediction[torch.arange(BATCH).repeat_interleave(LENGTH), POSITIONS]


def soft(prediction, emission):
    found = flat(prediction).soft_evidence(emission, POSITIONS)
    return found.view(BATCH, LENGTH, -1)


@BY_KIND
@pytest.mark.parametrize("gradients", [True, False])
def test_exact_evidence_is_the_sum_over_the_vocabulary(kind, gradients):
    logits = logits_of()
    logits[0, 0, 3:] = -torch.inf
    logits[1] = -torch.inf
    with torch.set_grad_enabled(gradients):  # without, small factors are held
        for impossible in (False, True):
            emission = emission_of(kind, impossible=impossible)
            forbidden = torch.arange(VOCAB) == 4
            found = soft(DenseEvidence.from_logits(logits, 0.7, forbidden), emission)
            phi = (logits / 0.7).masked_fill(forbidden, -torch.inf).log_softmax(-1)
            assert_logs_agree(found, plain(emission, phi.nan_to_num(-torch.inf)))


@BY_KIND
def test_in_chunks_evidence_and_its_gradients_are_the_same(kind, monkeypatch):
    def run():
        emission = emission_of(kind, dtype=torch.float64)
        for leaf in emission.tensors():
            leaf.requires_grad_()
        logits = logits_of(dtype=torch.float64).requires_grad_()
        prediction = DenseEvidence.from_logits(logits)
        found = soft(prediction, emission)
        leaves = [logits, *emission.tensors()]
        gradients = torch.autograd.grad(found.square().sum(), leaves)
        log_phi = flat(prediction).dense()
        mixed = mix_tokens(log_phi, found.flatten(0, 1), POSITIONS, emission)
        return found, *gradients, mixed, best_evidence(log_phi, POSITIONS, emission)

    whole = run()
    for module in ("potentials.circuit", "evidence.dense"):
        monkeypatch.setattr(f"codd_hf.circuits.{module}.ELEMENTS_AT_ONCE", 3 * LATENTS)
    monkeypatch.setattr("codd_hf.circuits.potentials.circuit.ONE_PRODUCT", 0)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other)


@BY_KIND
def test_evidence_is_float32_under_autocast_and_with_half_precision_weights(kind):
    emission = emission_of(kind, dtype=torch.bfloat16)
    exact = type(emission)(*(tensor.double() for tensor in emission.tensors()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft(DenseEvidence.from_logits(logits_of()), emission)
    assert found.dtype == torch.float32
    # A tied emission's own product is in the precision of its weights.
    expected = plain(exact, logits_of().log_softmax(-1))
    assert_logs_agree(found, expected, 5e-2 if kind == "tied" else 1e-5)


@BY_KIND
def test_evidence_that_underflows_is_repaired(kind):
    matrix = emission_of(kind).dense().clone()
    matrix[:, 0, 0] = 200.0
    emission, logits = DenseEmission(matrix), logits_of()
    logits[..., 0] = -torch.inf
    assert emission.can_underflow
    assert not emission_of(kind).can_underflow
    prediction = DenseEvidence.from_logits(logits)
    assert_logs_agree(soft(prediction, emission), plain(emission, prediction.log_probs))


@BY_KIND
def test_gradients_are_those_of_finite_differences_and_finite_where_impossible(kind):
    emission = emission_of(kind, dtype=torch.float64)
    leaves = [leaf.detach().requires_grad_() for leaf in emission.tensors()]

    def function(logits, *leaves):
        return soft(DenseEvidence.from_logits(logits, 0.9), type(emission)(*leaves))

    logits = logits_of(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (logits, *leaves), fast_mode=True)
    emission = emission_of(kind, impossible=True)
    leaves = [leaf.detach().requires_grad_() for leaf in emission.tensors()]
    logits = logits_of()
    logits[1] = -torch.inf
    found = function(logits.requires_grad_(), *leaves)
    assert not found.isnan().any()
    found[found > -torch.inf].sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (logits, *leaves))


@BY_KIND
def test_columns_are_of_tokens_and_rows_of_latents(kind):
    emission, positions = emission_of(kind), torch.arange(LENGTH)
    matrix = emission.dense().expand(LENGTH, -1, -1)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    latents = torch.randint(LATENTS, (BATCH, LENGTH))
    expected = matrix[positions, :, tokens], matrix[positions, latents]
    found = emission.columns(tokens, positions), emission.rows(latents, positions)
    torch.testing.assert_close(found, expected)


@BY_KIND
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("first", [1, 2, VOCAB])
def test_mixed_and_best_tokens_are_those_of_the_definition(kind, lost, first, monkeypatch):
    monkeypatch.setattr("codd_hf.circuits.evidence.dense.FIRST_LIST", first)
    emission, logits = emission_of(kind), logits_of()
    if lost:  # what the backbone allows is emitted by no state that carries weight in float32
        matrix = emission.dense().clone()
        matrix[:, :, 0] += 300
        emission = DenseEmission(matrix)
        logits[..., 0] = -torch.inf
    log_phi = flat(DenseEvidence.from_logits(logits)).dense()
    weights = torch.randn(len(log_phi), LATENTS)
    scores = emission.dense().double()[POSITIONS if kind == "dense, untied" else POSITIONS * 0]
    probs = (scores + weights[..., None] + log_phi[:, None]).exp().sum(1)
    probs = probs / probs.sum(-1, keepdim=True)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = mix_tokens(log_phi, weights, POSITIONS, emission).double()
            torch.testing.assert_close(found, probs, rtol=1e-4, atol=0)
    best = (scores + log_phi[:, None]).amax(-1)
    torch.testing.assert_close(best_evidence(log_phi, POSITIONS, emission).double(), best)
