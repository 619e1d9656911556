"""Bad input gets one clear sentence."""

import pytest
import torch
from cases import random_case

from codd_hf.circuits import (
    Context,
    CoupledCategorical,
    Potentials,
)


def make(**changes):
    g = torch.Generator().manual_seed(0)
    circuit = Potentials(torch.zeros(3), torch.zeros(1, 3, 3), torch.zeros(1, 3, 4))
    arguments = {"logits": torch.randn(2, 5, 4, generator=g), "potentials": circuit}
    return CoupledCategorical(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 5, 6)}, r"`logits` must have shape \[batch, length, 4\].*6\)"),
        ({"logits": torch.zeros(5, 4)}, r"`logits` must have shape \[batch, length, 4\]"),
        ({"tokens": torch.zeros(2, 4).long()}, r"`tokens` must have shape \(2, 5\)"),
        ({"observed": torch.zeros(1, 5).bool()}, r"`observed` must have shape \(2, 5\)"),
        ({"present": torch.zeros(5).bool()}, r"`present` must have shape \(2, 5\)"),
        ({"context": torch.zeros(2, 5, 4)}, r"`context` must have shape \(2, 5, 3\)"),
        ({"context": Context(torch.zeros(2, 4, 3))}, r"`context` must have shape \(2, 5, 3\)"),
        ({"active": torch.zeros(2, 1).bool()}, r"`active` must have shape \(2,\)"),
        ({"forbidden": torch.zeros(5).bool()}, r"`forbidden` must have shape \(4,\)"),
        ({"temperature": 0.0}, r"`temperature` must be above 0, within 1e-06 to 1e[+]06, got 0.0"),
        ({"temperature": float("nan")}, r"`temperature` must be above 0"),
        ({"observed": torch.ones(2, 5).bool()}, r"`tokens` must be given"),
        (
            {"observed": torch.ones(2, 5).bool(), "tokens": torch.full((2, 5), 4)},
            r"`tokens` must hold ids of the vocabulary, 0 to 3, got 4",
        ),
        (
            {"observed": torch.ones(2, 5).bool(), "tokens": torch.full((2, 5), -1)},
            r"`tokens` must hold ids of the vocabulary, 0 to 3, got -1",
        ),
        (
            {"potentials": Potentials(torch.zeros(3), torch.zeros(3, 3, 3), torch.zeros(1, 3, 4))},
            r"`logits` cover 5 positions, but the circuit's untied transition has 3",
        ),
        (
            {"potentials": Potentials(torch.zeros(3), torch.zeros(1, 3, 3), torch.zeros(4, 3, 4))},
            r"`logits` cover 5 positions, but the circuit's untied emission has 4",
        ),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_ids_at_positions_that_are_not_observed_do_not_matter():
    make(tokens=torch.full((2, 5), -100))


def test_log_prob_names_a_wrong_shape_and_a_wrong_id():
    ours = make()
    with pytest.raises(ValueError, match=r"`value` must have shape \(2, 5\), got \(2, 4\)"):
        ours.log_prob(torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="`value` must hold ids of the vocabulary, 0 to 3, got 4"):
        ours.log_prob(torch.tensor([[0, 1, 2, 3, 4]] * 2))


def test_condition_names_a_wrong_shape_and_a_wrong_id():
    ours = make()
    everywhere = torch.ones(2, 5).bool()
    with pytest.raises(ValueError, match=r"`tokens` must"):
        ours.condition(torch.full((2, 5), 7), everywhere)
    with pytest.raises(ValueError, match=r"`tokens` must have shape \(2, 5\)"):
        ours.condition(torch.zeros(1, 5).long(), everywhere)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("name", ["logits", "context"])
def test_nan_from_the_backbone_is_an_error(name, top_k):
    case = random_case(110, states=4, observed="none", context=1.0, top_k=top_k)
    case.leaves()[name][1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        _ = case.distribution().log_partition


def test_nan_at_positions_that_do_not_matter_is_ignored():
    case = random_case(111, observed="none", present="trailing")
    clean = case.distribution()
    spoilt = random_case(111, observed="none", present="trailing")
    spoilt.logits[~case.options["present"]] = torch.nan
    value = clean.sample(generator=torch.Generator().manual_seed(0))
    assert torch.equal(spoilt.distribution().log_prob(value), clean.log_prob(value))
