"""Promises of the scheduler's forward process, which is the noise of training."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2

from codd_hf import CoDDScheduler
from codd_hf.data.canvases import TokenizedExample, collate
from codd_hf.data.noise import sample_noise

MASK = 9


def law_of_masks(length: int, level: float, mean: float) -> dict[tuple[bool, ...], float]:
    """Probability of each pattern of masks, by summing over all ways to cut a row into spans."""
    law = dict.fromkeys(itertools.product((False, True), repeat=length), 0.0)
    for cuts in itertools.product((False, True), repeat=length - 1):
        weight = 1.0
        for cut in cuts:
            weight *= 1 / mean if cut else 1 - 1 / mean
        spans = [sum(cuts[:i]) for i in range(length)]  # the span that each position is in
        for hidden in itertools.product((False, True), repeat=spans[-1] + 1):
            chance = weight
            for one in hidden:
                chance *= level if one else 1 - level
            law[tuple(hidden[span] for span in spans)] += chance
    return law


@pytest.mark.parametrize("mean", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("level", [0.3, 0.8])
def test_masks_follow_the_law_of_spans(mean, level):
    rows, length = 20_000, 4
    law = law_of_masks(length, level, mean)
    assert sum(law.values()) == pytest.approx(1)
    noisy = CoDDScheduler(mask_token_id=MASK).add_noise(
        torch.zeros(rows, length, dtype=torch.long),
        level,
        generator=torch.Generator().manual_seed(0),
        mean_span_length=mean,
    )
    weights = 2 ** torch.arange(length)
    counts = torch.bincount(((noisy == MASK) * weights).sum(1), minlength=2**length)
    statistic, kinds = 0.0, 0
    for pattern, probability in law.items():
        seen = counts[sum(int(w) for w, hidden in zip(weights, pattern, strict=True) if hidden)]
        statistic += (seen.item() - rows * probability) ** 2 / (rows * probability)
        kinds += 1
    assert statistic < chi2.ppf(0.9999, kinds - 1)


def test_each_row_is_masked_at_its_own_rate_whatever_the_spans():
    levels = torch.tensor([0.0, 0.2, 0.7, 1.0])
    clean = torch.zeros(4, 60_000, dtype=torch.long)
    scheduler = CoDDScheduler(mask_token_id=MASK)
    generator = torch.Generator().manual_seed(0)
    noisy = scheduler.add_noise(clean, levels, generator=generator, mean_span_length=5.0)
    rate = (noisy == MASK).float().mean(1)
    assert rate[[0, 3]].tolist() == [0.0, 1.0]
    assert torch.allclose(rate, levels, atol=0.02)


@pytest.mark.parametrize("mean", [1.0, 3.0])
def test_the_noise_of_training_leaves_the_same_runs_of_masks(mean):
    rows, length = 3000, 16
    examples = [TokenizedExample([7], [5] * length) for _ in range(rows)]
    canvas = collate(examples, SimpleNamespace(eos_token_id=1, pad_token_id=0), length)
    noise = sample_noise(
        canvas,
        window_length=length,
        generator=torch.Generator().manual_seed(0),
        window_probability=1.0,
        mean_span_length=mean,
    )
    noisy = CoDDScheduler(mask_token_id=MASK).add_noise(
        canvas.input_ids,
        noise.level,
        generator=torch.Generator().manual_seed(1),
        mean_span_length=mean,
    )
    drawn = torch.stack((noise.target, noisy == MASK)).float()[:, :, 1:]  # without the prompt
    both = (drawn[:, :, 1:] * drawn[:, :, :-1]).mean((1, 2))
    ends = (drawn[:, :, 1:] != drawn[:, :, :-1]).float().mean((1, 2))
    for share in (drawn.mean((1, 2)), both, ends):
        assert share[0].item() == pytest.approx(share[1].item(), rel=0.06)


def test_spans_shorter_than_a_token_are_refused():
    with pytest.raises(ValueError, match=r"`mean_span_length` must be at least 1.*got 0\.5"):
        CoDDScheduler(mask_token_id=MASK).add_noise(
            torch.zeros(1, 4, dtype=torch.long), 0.5, mean_span_length=0.5
        )
