"""Bad input gets one clear sentence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import random_case

from codd_hf.circuits import Context, CoupledCategorical, Potentials

EVERYWHERE = torch.ones(2, 5).bool()


def circuit(steps: int = 1, positions: int = 1) -> Potentials:
    return Potentials(torch.zeros(3), torch.zeros(steps, 3, 3), torch.zeros(positions, 3, 4))


def make(**changes):
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    return CoupledCategorical(**({"logits": logits, "potentials": circuit()} | changes))


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
        ({"temperature": 0.0}, r"`temperature` must be at least 1e-06, got 0.0"),
        ({"temperature": float("nan")}, r"`temperature` must be a finite number"),
        ({"observed": EVERYWHERE}, r"`tokens` must be given"),
        (
            {"observed": EVERYWHERE, "tokens": torch.full((2, 5), -1)},
            r"`tokens` must hold ids of the vocabulary, 0 to 3, got -1",
        ),
        (
            {"potentials": circuit(steps=3)},
            r"5 positions, but .* 3 untied transitions",
        ),
        ({"potentials": circuit(1, 4)}, r"5 positions, but .* 4 untied emissions"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_lists_and_arrays_are_read_as_tensors_are():
    initial, transition, emission = (part.tolist() for part in circuit().tensors())
    forbidden = [False, True, False, False]
    lists = make(potentials=Potentials(initial, transition, emission), forbidden=forbidden)
    tensors = make(potentials=circuit(), forbidden=torch.tensor(forbidden))
    assert torch.allclose(lists.marginals, tensors.marginals, atol=1e-6)


@pytest.mark.parametrize("value", [torch.tensor([1, 2]), np.array([0, 1]), "1", None, True, [1.0]])
def test_temperature_that_is_no_number_is_refused_at_every_door(value):
    for call in (make().with_temperature, lambda value: make(temperature=value)):
        with pytest.raises(TypeError, match="`temperature` must be a number"):
            call(value)


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_law_of_unlisted_tokens_has_a_shape(shape):
    with pytest.raises(ValueError, match="log_marginal"):
        make(potentials=replace(circuit(), log_marginal=torch.zeros(shape)))


def test_queries_name_a_wrong_shape_and_a_wrong_id():
    ours, four = make(), torch.tensor([[0, 1, 2, 3, 4]] * 2)
    for query in (ours.log_prob, ours.coupling_gain, ours.marginal_probs_of):
        with pytest.raises(ValueError, match=r"`value` must have shape \(2, 5\), got \(2, 4\)"):
            query(torch.zeros(2, 4).long())
        with pytest.raises(ValueError, match=r"`value` must hold ids .*, 0 to 3, got 4"):
            query(four)
    with pytest.raises(ValueError, match="`tokens` must hold ids of the vocabulary"):
        ours.condition(four, EVERYWHERE)
    with pytest.raises(ValueError, match=r"`tokens` must have shape \(2, 5\)"):
        ours.condition(torch.zeros(1, 5).long(), EVERYWHERE)
    with pytest.raises(ValueError, match="`latents` must hold states, 0 to 2, got 3"):
        ours.logits_given(four)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("name", ["logits", "context"])
def test_nan_from_the_backbone_is_an_error(name, top_k):
    case = random_case(110, states=4, observed="none", context=1.0, top_k=top_k)
    case.leaves()[name][1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        _ = case.distribution().log_partition


def test_ids_and_nan_at_positions_that_do_not_matter_are_ignored():
    make(tokens=torch.full((2, 5), -100))
    clean, spoilt = (random_case(111, observed="none", present="trailing") for _ in range(2))
    spoilt.logits[~spoilt.options["present"]] = torch.nan
    value = clean.distribution().sample(generator=torch.Generator().manual_seed(0))
    log_probs = (case.distribution().log_prob(value) for case in (clean, spoilt))
    assert torch.equal(*log_probs)
