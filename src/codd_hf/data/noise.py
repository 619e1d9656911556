"""The forward process, to masks or to uniform noise, and the draws of it that training uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..backbones import block_length_of, noise_of
from ..coupling.windows import CoupledBackbone, stretch_at
from ..schedulers.scheduling_codd import span_uniforms, uniform_tokens
from .canvases import CanvasBatch, TokenizedExample, collate


@dataclass
class Noise:
    """The tokens of a batch of canvases that are replaced, and those that count in the loss.

    Attributes:
        masked: `[batch, length]` bool, the positions that the model sees as mask tokens, or as
            random ones.
        target: `[batch, length]` bool, the positions that count in the loss: masked ones in the
            noised span (later windows are masked too, but are no target); of uniform noise, which
            is not told from text, the whole span.
        span: `[batch, length]` bool, the positions that the noise could have hidden.
        level: `[batch]`, the probability `t` in (0, 1] with which it did.
        window: `[batch]`, where the noised window begins.
        end: `[batch]`, the position from which on nothing is seen.
        tokens: `[batch, length]`, uniform noise; None of masks.
    """

    masked: torch.Tensor
    target: torch.Tensor
    span: torch.Tensor
    level: torch.Tensor
    window: torch.Tensor
    end: torch.Tensor
    tokens: torch.Tensor | None = None

    @property
    def predicted(self) -> torch.Tensor:
        """`[batch, length]` bool, the positions that are not known to be text."""
        return self.masked if self.tokens is None else self.masked | self.target

    def applied(self, input_ids: torch.Tensor, model: CoupledBackbone) -> torch.Tensor:
        """The noised tokens of the canvases `[batch, length]`, on their device."""
        masked = self.masked.to(input_ids.device)
        if self.tokens is None:
            return input_ids.masked_fill(masked, model.mask_token_id)
        return torch.where(masked, self.tokens.to(input_ids.device), input_ids)


def sample_noise(
    canvas: CanvasBatch,
    *,
    window_length: int,
    generator: torch.Generator,
    window_probability: float = 0.5,
    prompt_probability: float = 0.15,
    minimum_level: float = 1e-2,
    mean_span_length: float = 1.0,
    infill: bool = False,
    config: PretrainedConfig | None = None,
) -> Noise:
    """Draws noise for a batch, one noise level `t ~ U(0, 1)` a row (stratified over the batch).

    A row is noised in one of two ways. *Window* noise is what block decoding meets: one window of
    the answer is the span, earlier ones are visible and later ones fully masked. Otherwise the
    span is the whole answer, or prompt and answer. A block-causal backbone meets the former alone,
    and there a block, behind which nothing is seen (`stretch_at`). Where canvases have one length,
    one of them is noised throughout, and the span is a window of it.

    Args:
        canvas: the clean canvases.
        window_length: length of a window; windows start at each row's `answer_start`.
        generator: source of all randomness, on the CPU.
        window_probability: share of rows with window noise.
        prompt_probability: share of the other rows in which the prompt is noised as well.
        minimum_level: the smallest `t`; the loss weight is `1/t`.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
        infill: windows begin anywhere in the answer, before its end-of-text, and later ones are
            visible too.
        config: the backbone's configuration; by default its attention is full, its noise masks.
    """
    batch, length = canvas.input_ids.shape
    start, end = canvas.answer_start[:, None], canvas.answer_end[:, None]
    position = torch.arange(length)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    strata = torch.randperm(batch, generator=generator)
    level = ((strata + uniform(batch)) / batch).clamp(min=minimum_level)

    by_window = uniform(batch, 1) < window_probability
    step, last = (1, end - 1) if infill else (window_length, end)
    num_windows = ((last - start - window_length) // step + 1).clamp(min=1)
    window_start = start + (uniform(batch, 1) * num_windows).long() * step
    window_end = torch.minimum(window_start + window_length, last)
    window, seen = window_start, end
    canvas_length = getattr(config, "canvas_length", None)
    if config is not None and (canvas_length or block_length_of(config)) is not None:
        place = start + (uniform(batch, 1) * (end - start)).long()
        found = stretch_at(place, start, end, window_length, config)
        window, window_start, window_end, seen = found
        by_window = torch.ones_like(by_window)
    in_window = (position >= window_start) & (position < window_end)
    with_prompt = uniform(batch, 1) < prompt_probability
    in_canvas = (position < end) & (with_prompt | (position >= start))
    span = torch.where(by_window, in_window, in_canvas)

    draws = span_uniforms((batch, length), mean_span_length, generator)
    target = span & (draws < level[:, None])
    later = by_window & (position >= window_end) & (position < end) & (not infill)
    parts = {"masked": target | later, "target": target, "span": span, "level": level}
    if config is not None and noise_of(config) == "uniform":
        size = config.get_text_config().vocab_size
        parts |= {"target": span, "tokens": uniform_tokens((batch, length), size, generator)}
    if canvas_length is not None:
        within = (position >= seen - canvas_length) & (position < seen)
        parts["masked"] = within & (draws < level[:, None])
    return Noise(**parts, window=window[:, 0], end=seen[:, 0])


def canvas_unit(config: PretrainedConfig | None, window_length: int) -> int:
    """Of how many tokens canvases are multiples: a window's, or those of the backbone's canvas."""
    return getattr(config, "canvas_length", None) or window_length


def draw_canvases(
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    window_length: int,
    max_extra_windows: int,
    generator: torch.Generator,
    infill: bool = False,
    config: PretrainedConfig | None = None,
    **noise: float,
) -> tuple[CanvasBatch, Noise]:
    """Canvases, each with up to `max_extra_windows` of end-of-text at its end, and their noise.

    The other arguments are those of `sample_noise`: with a `window_probability` of 1, one window of
    each row is noised, earlier ones are visible and later ones masked; to `infill`, all others are
    visible, and nothing follows the text.
    """
    size = canvas_unit(config, window_length)
    most = 0 if infill or size != window_length else max_extra_windows
    extra = torch.randint(most + 1, (len(examples),), generator=generator)
    canvas = collate(examples, tokenizer, size, extra.tolist(), infill)
    how: dict[str, Any] = {"infill": infill, "config": config, **noise}
    return canvas, sample_noise(canvas, window_length=window_length, generator=generator, **how)
