"""Promises of the noise that training draws."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from codd_hf.data.canvases import CanvasBatch, TokenizedExample, collate
from codd_hf.data.noise import Noise, sample_noise
from codd_hf.schedulers.scheduling_codd import span_uniforms

WINDOW = 4


def canvases(rows: int = 400) -> CanvasBatch:
    """Prompts of 3 tokens, answers of 1 to 5 windows."""
    examples = [TokenizedExample([7, 8, 9], [5] * (WINDOW * (1 + i % 5))) for i in range(rows)]
    return collate(examples, SimpleNamespace(eos_token_id=1, pad_token_id=0), WINDOW)


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


def test_windows_to_infill_begin_anywhere_and_all_around_them_is_visible():
    examples = [TokenizedExample([7, 8], [5] * (1 + i % 9) + [1]) for i in range(900)]
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    canvas = collate(examples, tokenizer, WINDOW, infill=True)
    assert canvas.input_ids[:2, :7].tolist() == [[7, 8, 5, 1, 1, 1, 0], [7, 8, 5, 5, 1, 1, 0]]
    noise = draw(canvas, window_probability=1.0, infill=True)
    assert torch.equal(noise.masked, noise.target)
    first = noise.span.long().argmax(1)
    longest = first[torch.tensor([len(e.answer_ids) for e in examples]) == 10]
    assert set(longest.tolist()) == {2, 3, 4, 5, 6, 7}
    assert (noise.span.sum(1)[3::9] == WINDOW).all()
    assert not noise.masked[:, :2].any()
    last = canvas.answer_end[:, None] - 1
    assert not noise.masked.gather(1, last).any()


@pytest.mark.parametrize("window_probability", [0.0, 1.0])
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


@pytest.mark.parametrize("mean", [1.0, 3.0, 8.0])
def test_spans_mask_each_token_with_the_probability_of_the_level_and_have_their_mean_length(mean):
    draws = span_uniforms((4000, 40), mean, torch.Generator().manual_seed(0))
    for level in (0.1, 0.5, 0.9):
        shares = (draws < level).float().mean(0)
        assert (shares - level).abs().max() < 5 * (level * (1 - level) / 4000) ** 0.5
    begins = draws[:, 1:] != draws[:, :-1]
    assert begins.float().mean().item() == pytest.approx(1 / mean, rel=0.02)
    # The runs of masked tokens that a level leaves are what parallel decoding meets.
    masked = draws < 0.25
    runs = (masked[:, 1:] & ~masked[:, :-1]).sum() + masked[:, 0].sum()
    assert (masked.sum() / runs).item() > 0.95 * mean


def test_spans_of_length_one_are_the_independent_draws():
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(span_uniforms((5, 7), 1.0, one), torch.rand(5, 7, generator=other))
    canvas = canvases(20)
    assert torch.equal(draw(canvas).masked, draw(canvas, mean_span_length=1.0).masked)


def test_rows_with_generators_of_their_own_get_the_same_spans_in_any_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = span_uniforms((2, 30), 4.0, generators(5, 6))
    assert torch.equal(both[1:], span_uniforms((1, 30), 4.0, generators(6)))


def test_noise_in_spans_leaves_longer_runs_at_the_same_level():
    canvas = canvases(2000)
    runs = []
    for mean in (1.0, 3.0):
        noise = draw(canvas, window_probability=1.0, mean_span_length=mean)
        expected = noise.level[:, None] * noise.span
        assert noise.target.sum().item() == pytest.approx(expected.sum().item(), rel=0.05)
        assert torch.equal(noise.target, noise.masked & noise.span)
        starts = noise.target[:, 1:] & ~noise.target[:, :-1]
        runs.append((noise.target.sum() / starts.sum()).item())
    assert runs[1] > 1.2 * runs[0]


@pytest.mark.parametrize("mean", [0.5, float("nan")])
def test_spans_shorter_than_a_token_are_an_error_that_gives_the_number(mean):
    with pytest.raises(ValueError, match=f"`mean_span_length` must be .*got {mean}"):
        draw(canvases(2), mean_span_length=mean)
