"""Gradients of `log_prob`: exact where ordinary, finite where awkward."""

from dataclasses import replace

import pytest
import torch
from cases import ALL, AWKWARD, CASES, STRUCTURES, TOP_K
from torch.autograd import gradcheck

from codd_hf.circuits import CoupledCategorical, Potentials

ORDINARY = [
    "tied",
    "untied",
    "absent inside",
    "absent at the start",
    "absent anywhere",
    "strong context",
    "sharp evidence",
    "forbidden token",
    "inactive rows",
    "none masked",
    "top 1",
    "top 2, untied",
    "top 2, forbidden token",
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


def likely_value(case):
    """A completion of positive probability for each row."""
    value = torch.zeros(case.logits.shape[:2], dtype=torch.long)
    for row in range(len(case)):
        exact = case.enumerate(row)
        if exact.positions:
            best = exact.log_prob.argmax()
            value[row, exact.positions] = exact.tokens[best]
    return value


@pytest.mark.parametrize("name", ORDINARY)
def test_gradients_are_those_of_the_enumerated_log_prob(name):
    case = CASES[name]
    value = likely_value(case)
    ours, our_leaves = with_gradients(case, torch.float64)
    theirs, their_leaves = with_gradients(case, torch.float64)
    our_loss = ours.distribution(torch.float64).log_prob(value).sum()
    their_loss = 0
    for row in range(len(case)):
        exact = theirs.enumerate(row)
        if exact.positions:
            their_loss = their_loss + exact.log_prob_of(value[row])
    assert float((our_loss - their_loss).detach().abs()) < 1e-8
    pairs = zip(
        torch.autograd.grad(our_loss, our_leaves, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(their_loss, their_leaves, allow_unused=True),
        strict=True,
    )
    for ours_grad, theirs_grad in pairs:
        theirs_grad = torch.zeros_like(ours_grad) if theirs_grad is None else theirs_grad
        assert float((ours_grad - theirs_grad).abs().max()) < 1e-7


@pytest.mark.parametrize("name", ["tied", "untied", "absent anywhere", "top 2, everything"])
def test_log_partition_and_marginals_pass_gradcheck(name):
    case = ALL[name].rows([0])
    names = list(case.leaves())

    def results(*tensors):
        ours = case.with_leaves(dict(zip(names, tensors, strict=True)))
        ours = ours.distribution(torch.float64)
        return ours.log_partition, ours.marginals, ours.latent_posterior

    assert gradcheck(results, [t.double().requires_grad_() for t in case.leaves().values()])


@pytest.mark.parametrize(
    "name",
    [
        "untied steps, dense emission, copies",
        "tied steps, dense emission, latent",
        "untied steps, tied to the embedding, all of them",
        "top 2, untied",
        "top 2, everything",
    ],
)
def test_log_prob_passes_gradcheck_in_every_leaf(name):
    case = ALL[name]
    value = likely_value(case)
    names = list(case.leaves())

    def log_prob(*tensors):
        ours = case.with_leaves(dict(zip(names, tensors, strict=True)))
        return ours.distribution(torch.float64).log_prob(value)

    assert gradcheck(log_prob, [t.double().requires_grad_() for t in case.leaves().values()])


def test_log_prob_passes_gradcheck_in_the_listed_log_probs_and_the_rest():
    case = TOP_K["top 2, untied"]
    listed = case.prediction(torch.float64)
    value = likely_value(case)

    def log_prob(log_probs, log_rest):
        prediction = replace(listed, log_probs=log_probs, log_rest=log_rest)
        circuit = case.circuit(torch.float64)
        return CoupledCategorical(prediction, circuit, **case.options).log_prob(value)

    leaves = [t.detach().requires_grad_() for t in (listed.log_probs, listed.log_rest)]
    assert gradcheck(log_prob, leaves)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite(name):
    case = ALL[name]
    value = likely_value(case)
    case, leaves = with_gradients(case, torch.float32)
    ours = case.distribution()
    loss = ours.log_prob(value)
    assert loss.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:  # a window of one position has no transitions
            assert gradient.isfinite().all(), tuple(leaf.shape)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_marginals_are_finite(name):
    case, leaves = with_gradients(ALL[name], torch.float32)
    g = torch.Generator().manual_seed(0)
    marginals = case.distribution().marginals
    loss = (marginals * torch.rand(marginals.shape, generator=g)).sum()
    for gradient in torch.autograd.grad(loss, leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_an_impossible_token_does_not_spoil_the_gradients_of_other_rows():
    case = CASES["hard zeros"]
    value = likely_value(case)
    dead = case.logits[0, 0] == -torch.inf
    if not dead.any():
        case.logits[0, 0, 3] = -torch.inf
        dead = case.logits[0, 0] == -torch.inf
    value[0, 0] = dead.nonzero()[0, 0]
    case, leaves = with_gradients(case, torch.float32)
    log_prob = case.distribution().log_prob(value)
    assert log_prob[0] == -torch.inf
    assert log_prob[1:].isfinite().all()
    for gradient in torch.autograd.grad(log_prob.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", AWKWARD)
def test_gradients_of_awkward_rows_are_those_of_the_enumeration(name):
    case = AWKWARD[name]
    value = likely_value(case)
    ours, our_leaves = with_gradients(case, torch.float32)
    theirs, their_leaves = with_gradients(case, torch.float64)
    ours_grad = torch.autograd.grad(ours.distribution().log_prob(value).sum(), our_leaves)
    loss = sum(theirs.enumerate(row).log_prob_of(value[row]) for row in range(len(case)))
    their_grad = torch.autograd.grad(loss, their_leaves)
    for mine, exact in zip(ours_grad, their_grad, strict=True):
        assert float((mine.double() - exact).abs().max()) < 1e-4


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

    alone = gradient([0])
    assert alone.abs().max() > 0.01
    assert gradient([0, 1]).isfinite().all()
