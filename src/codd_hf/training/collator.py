"""Noised batches for `transformers.Trainer`, whose loss is the model's own (`labels`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .data import TokenizedExample
from .window_cache import draw_windows

IGNORED = -100
NAMES = ("input_ids", "attention_mask", "labels")


@dataclass
class DataCollatorForMaskedDiffusion:
    """Lays texts out as canvases and masks a window of each, as block decoding meets it.

    A feature has `input_ids` and may have `labels`, -100 where the text is given: the answer begins
    at the first other label, or at the first token without any. It should end with end-of-text.
    The answer is filled with end-of-text to whole windows, one of which is noised at a level
    `t ~ U(0, 1)`; earlier ones are visible and later ones masked.

    Noise is drawn from torch's global generator, so that it is new in every epoch (and after a
    `Trainer` resumed). For an evaluation set that is the same every time, noise it once: `fixed`.

    Args:
        tokenizer: its end-of-text token fills windows, its padding token batches.
        mask_token_id: the model's mask token (`model.config.mask_token_id`).
        window_length: the head's (`model.window_length`).
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    window_length: int = 32
    max_extra_windows: int = 1
    mean_span_length: float = 1.0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels`, `[batch, length]` each.

        Labels are the text in the noised window, masked there or not, so that the model aligns its
        windows with it, and -100 elsewhere. Features that `fixed` made are only padded.
        """
        if all(self.mask_token_id in feature["input_ids"] for feature in features):
            return self._padded(features)
        seed = int(torch.empty((), dtype=torch.long).random_())
        canvas, noise, _ = draw_windows(
            [_example(feature) for feature in features],
            self.tokenizer,
            self.window_length,
            self.max_extra_windows,
            torch.Generator().manual_seed(seed),
            self.mean_span_length,
        )
        return {
            "input_ids": canvas.input_ids.masked_fill(noise.masked, self.mask_token_id),
            "attention_mask": canvas.attention_mask,
            "labels": canvas.input_ids.masked_fill(~noise.span, IGNORED),
        }

    def fixed(
        self, features: Sequence[Mapping[str, Any]], seed: int = 0
    ) -> list[dict[str, list[int]]]:
        """The features noised once, for an evaluation set; those that nothing hides are left out.

        Levels are spread evenly over the features.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batch = self(features)
        rows = zip(*(batch[name] for name in NAMES), strict=True)
        return [
            {"input_ids": ids[real.bool()].tolist(), "labels": labels[real.bool()].tolist()}
            for ids, real, labels in rows
            if self.mask_token_id in ids
        ]

    def _padded(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {}
        for name, padding in zip(NAMES, (self.tokenizer.pad_token_id, 0, IGNORED), strict=True):
            rows = [
                torch.as_tensor(f[name]) if name in f else torch.ones(len(f["input_ids"])).long()
                for f in features
            ]
            columns[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
        return columns


def _example(feature: Mapping[str, Any]) -> TokenizedExample:
    ids = [int(token) for token in feature["input_ids"]]
    labels = feature.get("labels")
    start = 0
    if labels is not None:
        start = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    if start == len(ids):
        raise ValueError(
            f"`labels` must leave a token to learn, got -100 for all {len(ids)}: leave such "
            "features out."
        )
    return TokenizedExample(ids[:start], ids[start:])
