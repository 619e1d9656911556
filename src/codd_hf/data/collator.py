"""Noised batches for `transformers.Trainer`, whose loss is the model's own (`labels`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..backbones import noise_of
from ..checks.arguments import as_tensor
from ..checks.settings import Count, Natural, Range, Settings
from ..text.encoding import encode_texts
from .canvases import TokenizedExample
from .noise import draw_canvases

IGNORED = -100


@dataclass
class DataCollatorForMaskedDiffusion(Settings):
    """Lays texts out as canvases and masks a window of each, as block decoding meets it.

    A feature has `input_ids` and may have `labels`, -100 where the text is given: the answer begins
    at the first other label, or at the first token without any. It should end with end-of-text.
    The answer is filled with end-of-text to whole windows, one of which is noised at a level
    `t ~ U(0, 1)`; earlier ones are visible and later ones masked. A mask token in the text itself,
    where a text spelt it, is replaced by the tokens of its spelling.

    Noise is drawn from torch's global generator, so that it is new in every epoch (and after a
    `Trainer` resumed).

    Args:
        tokenizer: its end-of-text token fills windows, its padding token batches.
        mask_token_id: the model's mask token (`model.config.mask_token_id`).
        window_length: the head's (`model.window_length`).
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
        config: the backbone's (`model.backbone.config`), if its attention is block-causal: of a
            window one block is noised then, and nothing is seen behind it.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: Natural
    window_length: Count = 32
    max_extra_windows: Natural = 1
    mean_span_length: Annotated[float, Range(1)] = 1.0
    config: PretrainedConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config is not None and noise_of(self.config) == "uniform":
            raise ValueError(
                "`config` is of a backbone whose noise is uniform, not masks: fit its head by "
                "`codd-hf train`."
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels`, `[batch, length]` each.

        Labels are the text in the noised window, masked there or not, so that the model aligns its
        windows with it, and -100 elsewhere. At least one of them is masked.

        Raises:
            TypeError: tokens are no integers.
            ValueError: a feature has nothing to learn, or its parts do not match.
        """
        examples = [self._example(feature) for feature in features]
        while True:
            seed = int(torch.empty((), dtype=torch.long).random_())
            canvas, noise = draw_canvases(
                examples,
                self.tokenizer,
                self.window_length,
                self.max_extra_windows,
                torch.Generator().manual_seed(seed),
                config=self.config,
                window_probability=1.0,
                mean_span_length=self.mean_span_length,
            )
            if bool(noise.target.any()):  # a batch has something to learn
                break
        position, end = torch.arange(canvas.input_ids.shape[1]), noise.end[:, None]
        place = position - noise.window[:, None]
        in_window = (place >= 0) & (place < self.window_length) & (position < end)
        return {
            "input_ids": canvas.input_ids.masked_fill(noise.masked, self.mask_token_id),
            "attention_mask": canvas.attention_mask * (position < end),
            "labels": canvas.input_ids.masked_fill(~in_window, IGNORED),
        }

    def _example(self, feature: Mapping[str, Any]) -> TokenizedExample:
        ids = as_tensor("input_ids", feature["input_ids"], int)
        labels = as_tensor("labels", feature.get("labels", ids), int, ids.shape)
        real = feature.get("attention_mask", torch.ones_like(ids))
        there = as_tensor("attention_mask", real, None, ids.shape).bool()
        learnt = (there & (labels != IGNORED)).nonzero()
        if not len(learnt):
            raise ValueError(
                f"`labels` must leave a token to learn, got -100 for all {len(ids)}: leave such "
                "features out."
            )
        start = int(learnt[0])
        parts = ids[:start][there[:start]], ids[start:][there[start:]]
        return TokenizedExample(*(self._spelt(part.tolist()) for part in parts))

    def _spelt(self, ids: list[int]) -> list[int]:
        """Tokens with the mask token's spelling in place of any mask token."""
        if self.mask_token_id not in ids:
            return ids
        name = str(self.tokenizer.convert_ids_to_tokens(self.mask_token_id))
        (spelling,), faults = encode_texts([name], self.tokenizer)
        if faults:
            raise ValueError(
                f"`input_ids` must not hold the mask token ({self.mask_token_id}), which the "
                "tokenizer cannot encode as text: leave such features out."
            )
        return [own for t in ids for own in (spelling if t == self.mask_token_id else (t,))]
