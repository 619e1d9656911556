"""The chain's fast path, taken where transitions are close together, against enumeration.

Without a second look at what float32 rounds to zero, adversarial evidence must not matter as long
as no transition is more than `SAFE_RANGE` nats below the largest.
"""

from __future__ import annotations

import pytest
import torch
from agreement import assert_logs_agree
from brute_force import Case

from codd_hf.circuits.recursions import chain as chains

ROWS, LENGTH, STATES = 6, 6, 4
STRUCTURES = [
    "dense",
    "dense, untied",
    "copies",
]
LIMIT = chains.SAFE_RANGE - 0.01


def extreme_case(seed: int, structure: str, spread: float = LIMIT) -> Case:
    """Transitions at both ends of what is allowed; evidence at the edge of what float32 holds."""
    g = torch.Generator().manual_seed(seed)
    length = 4 if structure == "copies" else LENGTH  # that has twice as many states

    def either(*shape, width=spread):
        """Largest, smallest, or in between; both ends occur."""
        numbers = -width * torch.randint(3, shape, generator=g) / 2
        numbers.view(-1)[0], numbers.view(-1)[1] = 0.0, -width
        return numbers

    levels = torch.tensor([0.0, -3.0, -50.0, -80.0, -86.0, -88.0, -95.0, -101.0, -104.0, -120.0])
    context = levels[torch.randint(len(levels), (ROWS, length, STATES), generator=g)]
    case = Case(
        logits=torch.zeros(ROWS, length, 1),
        initial=either(STATES, width=40.0),
        transition=torch.zeros(1, STATES, STATES),
        emission=torch.zeros(1, STATES, 1),
        options={"context": context},
    )
    steps = length - 1 if "untied" in structure else 1
    room = spread
    if structure == "copies":
        # Begun with -20 to -1 and emitted with -10 to 0: the limit, since all rows add up to 1.
        room = spread - 12.0
        case.logits = torch.zeros(ROWS, length, 2)
        case.emission = torch.zeros(1, STATES, 2)
        case.options["tokens"] = torch.randint(2, (ROWS, length), generator=g)
        case.options["observed"] = torch.rand(ROWS, length, generator=g) < 0.3
        case.copied = torch.randint(2, (ROWS, 4), generator=g)
        case.start = either(ROWS, length, 4, width=19.0) - 1
        case.follow = either(ROWS, length, 4, width=80.0) - 1
        case.emitted = either(ROWS, 4, STATES, width=10.0)
        case.out = either(ROWS, 4, STATES, width=80.0).log_softmax(-1)
        case.copy_weight = 12 + either(ROWS, 4, width=100.0)
        case.copy_limits = -30.0, -1.0
    case.transition = either(steps, STATES, STATES, width=room)
    if structure == "copies":
        case.transition = case.transition.log_softmax(-1)
    return case


def agrees(case: Case, safe: bool) -> None:
    ours = case.distribution()
    assert ours.latents.chain(ours.latents.evidence).cannot_underflow == safe
    posterior, log_partition = ours.latent_posterior, ours.log_partition
    rows = [case.enumerate(row) for row in range(len(case))]
    assert_logs_agree(log_partition, torch.stack([row.log_partition for row in rows]))
    exact = torch.stack([row.latent_posterior for row in rows])
    error = (posterior.double() - exact).abs()
    assert not posterior.isnan().any()
    assert (error <= 1e-4 * exact + 1e-8).all()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("seed", range(5))
def test_just_below_the_limit_the_fast_path_is_exact(structure, seed):
    agrees(extreme_case(seed, structure), safe=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_above_the_limit_the_careful_path_is_exact(structure):
    agrees(extreme_case(10, structure, spread=80.0), safe=False)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_both_paths_agree_below_the_limit(structure, monkeypatch):
    case = extreme_case(20, structure)
    fast = case.distribution()
    results = fast.log_partition, fast.latent_posterior
    drawn = fast.sample_latents([torch.Generator().manual_seed(row) for row in range(ROWS)])
    monkeypatch.setattr(chains, "SAFE_RANGE", -1.0)
    careful = case.distribution()
    assert not careful.latents.chain(careful.latents.evidence).cannot_underflow
    assert_logs_agree(results[0], careful.log_partition)
    assert float((results[1] - careful.latent_posterior).abs().max()) < 1e-5
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
    assert torch.equal(drawn, careful.sample_latents(generators))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_of_the_fast_path_are_finite_and_those_of_the_careful_one(structure, monkeypatch):
    def gradients():
        case = extreme_case(30, structure)
        leaves = {k: leaf.clone().requires_grad_() for k, leaf in case.leaves().items()}
        total = case.with_leaves(leaves).distribution().log_partition.sum()
        return torch.autograd.grad(total, list(leaves.values()))

    fast = gradients()
    monkeypatch.setattr(chains, "SAFE_RANGE", -1.0)
    for mine, exact in zip(fast, gradients(), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_spread_of_a_step_is_never_underestimated(structure):
    for seed in range(10):
        case = extreme_case(seed, structure)
        spread = case.distribution().latents.steps.log_range
        for row in range(ROWS):
            for i in range(1, case.logits.shape[1]):
                step = case.log_step(row, i)
                assert float(step.max() - step.min()) <= spread + 1e-4


def test_an_impossible_step_is_never_on_the_fast_path():
    case = extreme_case(40, "dense")
    case.transition[0, 1, 2] = -torch.inf
    agrees(case, safe=False)
