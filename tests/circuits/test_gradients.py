"""Gradients of `log_prob`: exact where ordinary, finite where awkward."""

from dataclasses import replace

import pytest
import torch
from cases import ALL, AWKWARD, STRUCTURES, enumerations, hard_zero_case
from torch.autograd import gradcheck

from codd_hf.circuits import CoupledCategorical, Potentials

ORDINARY = [
    "tied",
    "untied",
    "absent at the start",
    "absent anywhere",
    "strong context",
    "sharp evidence",
    "forbidden token",
    "inactive rows",
    "none masked",
    "top 1",
    "top 2, untied",
    "top 2, everything",
    "all tokens listed",
    "inactive rows, everything",
    *STRUCTURES,
]


def with_gradients(case, dtype):
    """The case with leaves for all that it is made of and (always) a context, and the leaves."""
    batch, length, _ = case.logits.shape
    leaves = {"context": torch.zeros(batch, length, len(case.initial))} | case.leaves()
    leaves = {k: leaf.detach().to(dtype).requires_grad_() for k, leaf in leaves.items()}
    return case.with_leaves(leaves), list(leaves.values())


def likely_value(case, exact):
    """A completion of positive probability for each row."""
    value = torch.zeros(case.logits.shape[:2], dtype=torch.long)
    for row, enumeration in enumerate(exact):
        if enumeration.positions:
            best = enumeration.log_prob.argmax()
            value[row, enumeration.positions] = enumeration.tokens[best]
    return value


@pytest.mark.parametrize("name", [*ORDINARY, *AWKWARD])
def test_gradients_are_those_of_the_enumerated_log_prob(name):
    case, dtype = ALL[name], torch.float32 if name in AWKWARD else torch.float64
    value = likely_value(case, enumerations(name))
    ours, our_leaves = with_gradients(case, dtype)
    theirs, their_leaves = with_gradients(case, torch.float64)
    exact = [theirs.enumerate(row) for row in range(len(case))]
    their_loss = sum(e.log_prob_of(value[row]) for row, e in enumerate(exact) if e.positions)
    our_loss = ours.distribution(dtype).log_prob(value).sum()
    assert float((our_loss - their_loss).detach().abs()) < (1e-3 if name in AWKWARD else 1e-8)
    pairs = zip(
        torch.autograd.grad(our_loss, our_leaves, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(their_loss, their_leaves, materialize_grads=True, allow_unused=True),
        strict=True,
    )
    for mine, expected in pairs:
        close = 1e-4 if name in AWKWARD else 1e-7
        assert float((mine.double() - expected).abs().max()) < close


@pytest.mark.parametrize("name", ["untied", "absent anywhere", "top 2, everything"])
def test_log_partition_and_marginals_pass_gradcheck(name):
    case = ALL[name].rows([0])
    names = list(case.leaves())

    def results(*tensors):
        ours = case.with_leaves(dict(zip(names, tensors, strict=True)))
        ours = ours.distribution(torch.float64)
        return ours.log_partition, ours.marginals, ours.latent_posterior

    leaves = [t.double().requires_grad_() for t in case.leaves().values()]
    assert gradcheck(results, leaves, fast_mode=True)


def test_log_prob_passes_gradcheck_in_the_listed_log_probs_and_the_rest():
    case = ALL["top 2, untied"]
    listed, value = (
        case.prediction(torch.float64),
        likely_value(case, enumerations("top 2, untied")),
    )

    def log_prob(log_probs, log_rest):
        prediction = replace(listed, log_probs=log_probs, log_rest=log_rest)
        circuit = case.circuit(torch.float64)
        return CoupledCategorical(prediction, circuit, **case.options).log_prob(value)

    leaves = [t.detach().requires_grad_() for t in (listed.log_probs, listed.log_rest)]
    assert gradcheck(log_prob, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_log_prob_and_marginals_are_finite(name):
    value = likely_value(ALL[name], enumerations(name))
    case, leaves = with_gradients(ALL[name], torch.float32)
    ours, g = case.distribution(), torch.Generator().manual_seed(0)
    log_prob, marginals = ours.log_prob(value), ours.marginals
    assert log_prob.isfinite().all()
    for loss in (log_prob.sum(), (marginals * torch.rand(marginals.shape, generator=g)).sum()):
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:  # a window of one position has no transitions
                assert gradient.isfinite().all(), tuple(leaf.shape)


def test_an_impossible_token_does_not_spoil_the_gradients_of_other_rows():
    case = hard_zero_case(26, batch=6, observed="none")
    value = likely_value(case, enumerations("hard zeros"))
    case.logits[0, 0, 3] = -torch.inf
    value[0, 0] = 3
    case, leaves = with_gradients(case, torch.float32)
    log_prob = case.distribution().log_prob(value)
    assert log_prob[0] == -torch.inf
    assert log_prob[1:].isfinite().all()
    for gradient in torch.autograd.grad(log_prob.sum(), leaves):
        assert gradient.isfinite().all()


def test_an_impossible_row_does_not_spoil_what_the_posterior_of_others_depends_on():
    torch.manual_seed(0)
    transition = torch.randn(1, 2, 2, requires_grad=True)
    emission = torch.zeros(1, 2, 3)
    emission[..., 0] = -torch.inf
    logits = torch.zeros(2, 4, 3)
    logits[1, 2, 1:] = -torch.inf  # leaves the token that no state emits

    def gradient(rows):
        circuit = Potentials(torch.zeros(2), transition, emission)
        posterior = CoupledCategorical(logits[rows], circuit).latent_posterior
        return torch.autograd.grad((posterior * torch.tensor([1.0, 2.0])).sum(), transition)[0]

    assert gradient([0]).abs().max() > 0.01
    assert gradient([0, 1]).isfinite().all()
