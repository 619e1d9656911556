"""Promises of the noise that training draws."""

from __future__ import annotations

import pytest
import torch

from codd_hf.training.data import CanvasBatch, TokenizedExample, collate
from codd_hf.training.noise import Noise, sample_noise

WINDOW = 4


def canvases(rows: int = 400) -> CanvasBatch:
    """Prompts of 3 tokens, answers of 1 to 5 windows."""
    examples = [TokenizedExample([7, 8, 9], [5] * (WINDOW * (1 + i % 5))) for i in range(rows)]
    return collate(examples, window_length=WINDOW, eos_token_id=1, pad_token_id=0)


def draw(canvas: CanvasBatch, seed: int = 0, **options) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return sample_noise(canvas, window_length=WINDOW, generator=generator, **options)


def test_share_of_masked_tokens_is_the_level_of_the_row():
    canvas = canvases(2000)
    noise = draw(canvas, window_probability=0.0)
    expected = noise.level[:, None] * noise.span
    variance = (noise.level * (1 - noise.level))[:, None] * noise.span
    for rows in (noise.level < 0.3, noise.level > 0.7, noise.level > 0):
        surplus = noise.target[rows].sum() - expected[rows].sum()
        assert abs(surplus) < 4 * variance[rows].sum().sqrt()


def test_levels_cover_zero_to_one_evenly_and_never_reach_zero():
    level = draw(canvases(100)).level.sort().values
    assert ((level - (torch.arange(100) + 0.5) / 100).abs() <= 0.0101).all()
    assert level.min() >= 1e-2


def test_window_noise_shows_earlier_windows_and_hides_later_ones():
    canvas = canvases()
    noise = draw(canvas, window_probability=1.0)
    first = noise.span.long().argmax(1)
    assert ((first - canvas.answer_start) % WINDOW == 0).all()
    assert (noise.span.sum(1) == WINDOW).all()
    position = torch.arange(canvas.input_ids.shape[1])
    before = position < first[:, None]
    after = (position >= first[:, None] + WINDOW) & (position < canvas.answer_end[:, None])
    assert not noise.masked[before].any()
    assert noise.masked[after].all()
    assert after.any()
    assert not (noise.masked & (position >= canvas.answer_end[:, None])).any()
    assert len({int(w) for w in (first - canvas.answer_start) // WINDOW}) == 5


@pytest.mark.parametrize("window_probability", [0.0, 0.5, 1.0])
def test_only_masked_tokens_of_the_span_count_in_the_loss(window_probability):
    noise = draw(canvases(), window_probability=window_probability)
    assert torch.equal(noise.target, noise.masked & noise.span)


def test_padding_is_never_masked():
    canvas = canvases()
    noise = draw(canvas, prompt_probability=1.0)
    assert not (noise.masked & (canvas.attention_mask == 0)).any()


def test_prompts_are_noised_in_the_asked_share_of_rows_only():
    canvas = canvases()
    prompt = torch.arange(canvas.input_ids.shape[1]) < canvas.answer_start[:, None]
    for probability, low, high in ((0.0, 0, 0), (0.25, 0.15, 0.35), (1.0, 1, 1)):
        noise = draw(canvas, window_probability=0.0, prompt_probability=probability)
        share = (noise.span & prompt).any(1).float().mean()
        assert low <= share <= high


def test_same_generator_seed_draws_the_same_noise():
    canvas = canvases(20)
    assert torch.equal(draw(canvas, 3).masked, draw(canvas, 3).masked)
    assert not torch.equal(draw(canvas, 3).masked, draw(canvas, 4).masked)
