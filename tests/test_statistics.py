"""Promises of the figures of texts: counts by hand, and errors by leaving texts out."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from codd_hf.evaluation.statistics import entropy, mean, repeated_ngrams


def test_repetition_is_as_counted_by_hand():
    grams = repeated_ngrams([[1, 2, 3, 1, 2, 3, 1], [4, 5], [7, 7, 7, 7]], 3)
    # 123 231 312 123 231: two of five; no run of three; 777 777: one of two.
    assert grams.value == pytest.approx(100 * 3 / 7)


def test_entropy_is_that_of_all_tokens_together():
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy([[1, 1], [1, 2]]).value == pytest.approx(quarter)
    assert entropy([[], []]).value == 0


def test_errors_are_those_of_computing_again_without_each_text():
    texts = [[1, 2, 3], [1, 1], [4], [2, 2, 5, 6]]
    without = []
    for left in range(4):
        counts = Counter(t for i, text in enumerate(texts) if i != left for t in text)
        total = sum(counts.values())
        without.append(-sum(c / total * math.log(c / total) for c in counts.values()))
    estimate = entropy(texts)
    assert estimate.left_out.tolist() == pytest.approx(without)
    squares = sum((w - sum(without) / 4) ** 2 for w in without)
    assert estimate.error == pytest.approx(math.sqrt(3 / 4 * squares))


def test_error_of_a_mean_is_the_usual_one_and_differences_are_paired():
    values = torch.tensor([1.0, 4.0, 2.0, 7.0])
    one, shifted = mean(values), mean(values + 3)
    assert one.error == pytest.approx(values.std().item() / 2)
    assert (shifted - one).value == pytest.approx(3)
    assert (shifted - one).error == pytest.approx(0, abs=1e-12)
    assert mean([3.0]).error is None
    assert f"{one:+.2f}, {mean([3.0]):.1f}" == f"+3.50 ± {one.error:.2f}, 3.0"
