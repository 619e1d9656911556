"""Promises of the testbed whose probabilities are known."""

from __future__ import annotations

import itertools

import pytest
import torch

from codd_hf.evaluation import JointSettings, joint
from codd_hf.evaluation.joint import BALLS, CLASSES, LETTERS, SOURCES, divergences, draw, emission
from codd_hf.training.run import train
from codd_hf.training.settings import build_config


@pytest.mark.parametrize("name", SOURCES)
def test_probabilities_of_all_texts_sum_to_one_and_none_is_zero(name):
    texts = torch.cartesian_prod(*[torch.arange(len(LETTERS))] * 2)
    probabilities = SOURCES[name][1](texts).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.min() > 0


@pytest.mark.parametrize("name", SOURCES)
def test_log_prob_is_that_of_the_sum_over_classes(name):
    texts = torch.randint(len(LETTERS), (3, 4), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, dtype=torch.float64)
    for path in itertools.product(range(CLASSES), repeat=4):
        weight = 1.0
        for i, after in enumerate(path):
            steps = {0: 0.75, 1: 0.25}.get((after - path[i - 1]) % CLASSES, 0)
            weight *= {
                "block HMM": steps if i else 1 / CLASSES,
                "urn": (path[:i].count(after) + BALLS) / (i + CLASSES * BALLS),
                "palindromes": (after == path[3 - i]) / CLASSES**0.5,
            }[name]
        letters = emission(SOURCES[name][2])
        expected += weight * letters[torch.tensor(path), texts].prod(-1)
    assert torch.allclose(SOURCES[name][1](texts), expected.log())


@pytest.mark.parametrize("name", SOURCES)
def test_texts_are_drawn_from_the_law(name, monkeypatch):
    monkeypatch.setattr(joint, "LENGTH", 2)
    classes = draw(SOURCES[name], 20_000, 0) % CLASSES
    counts = (classes[:, 0] * CLASSES + classes[:, 1]).bincount(minlength=CLASSES**2)
    pairs = torch.cartesian_prod(*[torch.arange(len(LETTERS))] * 2)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    at = tuple((pairs % CLASSES).T)
    expected.index_put_(at, SOURCES[name][1](pairs).exp(), accumulate=True)
    # Four standard deviations of a share of 20,000 draws are at most 0.013.
    assert (counts / 20_000 - expected.flatten()).abs().max() < 0.013


def test_divergences_are_those_of_enumeration_and_rows_compare_both_laws(monkeypatch):
    pipelines = []

    def briefly(values):
        less = {"pretraining.max_steps": 4, "generative.num_epochs": 1, "num_validation": 20}
        return train(build_config(values | less))

    def kept(*args):
        pipelines.append(fitted(*args))
        return pipelines[-1]

    fitted = joint.fitted
    monkeypatch.setattr(joint, "fitted", kept)
    monkeypatch.setattr(joint, "SOURCES", {"palindromes": SOURCES["palindromes"]})
    small = JointSettings(num_texts=200, num_steps=2, num_samples=50, num_seeds=1)
    rows = joint.measure(small, briefly).tables["rows"]
    assert [row["law"] for row in rows] == ["factorized", "CoDD"]
    assert rows[0]["factorized / this"].value == 1

    monkeypatch.setattr(joint, "LENGTH", 2)
    (pipeline,), source = pipelines, SOURCES["palindromes"]
    texts = torch.cartesian_prod(*[torch.arange(len(LETTERS))] * 2)
    tokens = torch.tensor(joint.tokens_of(pipeline))[texts]
    for head in (False, None):
        ids = torch.full((1, 2), pipeline.model.mask_token_id)
        with torch.no_grad():
            law = pipeline.model(
                ids, head=head, window_start=torch.zeros(1).long(), return_distribution=True
            ).distribution
        padded = torch.nn.functional.pad(tokens, (0, law.tokens.shape[1] - 2))
        log_q, log_p = law.log_prob(padded[:, None])[:, 0].double(), source[1](texts)
        assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
        reverse, forward = divergences(pipeline, head, source, 20_000, 0)
        assert reverse == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), abs=0.06)
        assert forward == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), abs=0.06)
