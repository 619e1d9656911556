"""Probabilities in float32, in float64 and logarithms, each where it is safe, against enumeration.

Without a second look at what is rounded to zero, adversarial evidence must not matter as long as no
transition is further below the largest than the precision's range.
"""

from __future__ import annotations

import pytest
import torch
from agreement import assert_logs_agree
from brute_force import Case

from codd_hf.circuits.recursions import chain as chains

ROWS, LENGTH, STATES = 6, 6, 4
STRUCTURE = pytest.mark.parametrize("structure", ["dense", "dense, untied", "copies"])
SINGLE, DOUBLE = chains.SINGLE_RANGE - 0.01, chains.DOUBLE_RANGE - 0.01


def extreme_case(seed: int, structure: str, spread: float = SINGLE) -> Case:
    """Transitions at both ends of what is allowed; evidence at the edge of what floats hold."""
    g = torch.Generator().manual_seed(seed)
    copies = structure == "copies"
    length = 4 if copies else LENGTH  # that has twice as many states

    def either(*shape, width=spread):
        """Largest, smallest, or in between; both ends occur."""
        numbers = -width * torch.randint(3, shape, generator=g) / 2
        numbers.view(-1)[0], numbers.view(-1)[1] = 0.0, -width
        return numbers

    levels = torch.tensor([0.0, -3.0, -50.0, -80.0, -86.0, -88.0, -95.0, -101.0, -104.0, -120.0])
    levels = levels * (1.0 if spread < 40 else 7.0)
    context = levels[torch.randint(len(levels), (ROWS, length, STATES), generator=g)]
    steps = length - 1 if "untied" in structure else 1
    transition = either(steps, STATES, STATES, width=spread - 12.0 * copies)
    case = Case(
        logits=torch.zeros(ROWS, length, 1 + copies),
        initial=either(STATES, width=40.0),
        transition=transition.log_softmax(-1) if copies else transition,
        emission=torch.zeros(1, STATES, 1 + copies),
        options={"context": context},
    )
    if copies:
        # Begun with -20 to -1 and emitted with -10 to 0: the limit, since all rows add up to 1.
        case.options["tokens"] = torch.randint(2, (ROWS, length), generator=g)
        case.options["observed"] = torch.rand(ROWS, length, generator=g) < 0.3
        case.copied = torch.randint(2, (ROWS, 4), generator=g)
        case.start = either(ROWS, length, 4, width=19.0) - 1
        case.follow = either(ROWS, length, 4, width=80.0) - 1
        case.emitted = either(ROWS, 4, STATES, width=10.0)
        case.out = either(ROWS, 4, STATES, width=80.0).log_softmax(-1)
        case.copy_weight = 12 + either(ROWS, 4, width=100.0)
        case.copy_limits = -30.0, -1.0
    return case


def worked_on(case: Case) -> torch.dtype | None:
    """The dtype of probabilities; None of logarithms."""
    algebra = case.distribution().latents.own_chain.algebra
    return algebra.weights[0].dtype if algebra.times is torch.mul else None


@STRUCTURE
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("spread", "dtype"),
    [(SINGLE, torch.float32), (80.0, torch.float64), (DOUBLE, torch.float64), (400.0, None)],
)
def test_every_precision_is_exact_up_to_its_limit(structure, seed, spread, dtype):
    case = extreme_case(seed, structure, spread)
    ours, exact = case.distribution(), [case.enumerate(row) for row in range(len(case))]
    assert worked_on(case) == dtype
    assert_logs_agree(ours.log_partition, torch.stack([row.log_partition for row in exact]))
    posterior = torch.stack([row.latent_posterior for row in exact])
    error = (ours.latent_posterior.double() - posterior).abs()
    assert (error <= 1e-4 * posterior + 1e-8).all()


def test_an_impossible_step_is_worked_on_in_logarithms():
    case = extreme_case(40, "dense")
    case.transition[0, 1, 2] = -torch.inf
    assert worked_on(case) is None


@STRUCTURE
@pytest.mark.parametrize("limits", [(-1.0, 400.0), (-1.0, -1.0)])
def test_all_precisions_give_the_same_sums_samples_and_gradients(structure, limits, monkeypatch):
    def results():
        case = extreme_case(20, structure)
        leaves = {k: leaf.clone().requires_grad_() for k, leaf in case.leaves().items()}
        ours = case.with_leaves(leaves).distribution()
        drawn = ours.sample_latents([torch.Generator().manual_seed(row) for row in range(ROWS)])
        gradients = torch.autograd.grad(ours.log_partition.sum(), list(leaves.values()))
        return worked_on(case), drawn, gradients

    single, drawn, gradients = results()
    monkeypatch.setattr(chains, "SINGLE_RANGE", limits[0])
    monkeypatch.setattr(chains, "DOUBLE_RANGE", limits[1])
    other, again, exact = results()
    assert (single, other) == (torch.float32, torch.float64 if limits[1] > 0 else None)
    assert torch.equal(drawn, again)
    for mine, theirs in zip(gradients, exact, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@STRUCTURE
def test_the_range_of_a_step_is_never_underestimated(structure):
    for seed in range(10):
        case = extreme_case(seed, structure)
        log_range = case.distribution().latents.steps.log_range
        for row in range(ROWS):
            for i in range(1, case.logits.shape[1]):
                step = case.log_step(row, i)
                assert float(step.max() - step.min()) <= log_range + 1e-4
