"""Noised batches for `transformers.Trainer`, whose loss is the model's own (`labels`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..checks.arguments import as_tensor, shown
from ..checks.settings import Count, Natural, Range, Settings
from ..text.encoding import encode_texts
from .canvases import TokenizedExample, padding_token_id
from .noise import draw_windows

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
    `Trainer` resumed). For an evaluation set that is the same every time, noise it once: `fixed`.

    Args:
        tokenizer: its end-of-text token fills windows, its padding token batches.
        mask_token_id: the model's mask token (`model.config.mask_token_id`).
        window_length: the head's (`model.window_length`).
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: Natural
    window_length: Count = 32
    max_extra_windows: Natural = 1
    mean_span_length: Annotated[float, Range(1)] = 1.0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels`, `[batch, length]` each.

        Labels are the text in the noised window, masked there or not, so that the model aligns its
        windows with it, and -100 elsewhere. At least one of them is masked. Features that `fixed`
        made are only padded.

        Raises:
            TypeError: tokens are no integers.
            ValueError: there is no feature, one has nothing to learn, or its parts do not match.
        """
        rows = list(features) if isinstance(features, Iterable) else []
        if not rows or not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
            raise ValueError(
                "`features` must hold at least one, each with `input_ids`, got "
                f"{shown([list(row) if isinstance(row, Mapping) else row for row in rows])}."
            )
        features = [_read(row) for row in rows]
        fixed = {_is_noised(feature) for feature in features}
        if fixed == {True, False}:
            raise ValueError("`features` must be all noised by `fixed` or none, got both.")
        if fixed == {True}:
            return self._padded(features)
        examples = [self._example(feature) for feature in features]
        while True:
            seed = int(torch.empty((), dtype=torch.long).random_())
            canvas, noise, _ = draw_windows(
                examples,
                self.tokenizer,
                self.window_length,
                self.max_extra_windows,
                torch.Generator().manual_seed(seed),
                self.mean_span_length,
            )
            if bool(noise.target.any()):  # a batch has something to learn
                break
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
        noised = []
        for row, real in enumerate(batch["attention_mask"].bool()):
            parts = {name: batch[name][row][real].tolist() for name in ("input_ids", "labels")}
            noised += [parts] if _is_noised(parts) else []
        return noised

    def _padded(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        columns = {"input_ids": padding_token_id(self.tokenizer), "labels": IGNORED}
        features = [{**f, "attention_mask": [1] * len(f["input_ids"])} for f in features]
        return {
            name: pad_sequence([torch.as_tensor(f[name]) for f in features], True, padding)
            for name, padding in {**columns, "attention_mask": 0}.items()
        }

    def _example(self, feature: Mapping[str, list[int]]) -> TokenizedExample:
        ids = feature["input_ids"]
        labels, real = feature.get("labels", ids), feature.get("attention_mask", [1] * len(ids))
        if not len(ids) == len(labels) == len(real):
            raise ValueError(
                "`labels` and `attention_mask` must be as long as `input_ids`, got "
                f"{len(labels)} and {len(real)} for {len(ids)}."
            )
        start = next((i for i, label in enumerate(labels) if label != IGNORED and real[i]), None)
        if start is None:
            raise ValueError(
                f"`labels` must leave a token to learn, got -100 for all {len(ids)}: leave such "
                "features out."
            )
        parts = range(start), range(start, len(ids))
        return TokenizedExample(*(self._spelt([ids[i] for i in part if real[i]]) for part in parts))

    def _spelt(self, ids: list[int]) -> list[int]:
        """Tokens with the mask token's spelling in place of any mask token."""
        if self.mask_token_id not in ids:
            return ids
        name = self.tokenizer.convert_ids_to_tokens(self.mask_token_id)
        (spelling,), faults = encode_texts([name], self.tokenizer)
        if faults:
            raise ValueError(
                f"`input_ids` must not hold the mask token ({self.mask_token_id}), which the "
                "tokenizer cannot encode as text: leave such features out."
            )
        return [own for t in ids for own in (spelling if t == self.mask_token_id else (t,))]


def _read(feature: Mapping[str, Any]) -> dict[str, list[int]]:
    """The parts of a feature that are there, as lists."""
    parts = {}
    for name, kind in (("input_ids", int), ("labels", int), ("attention_mask", None)):
        if feature.get(name) is not None:
            part = as_tensor(name, feature[name], kind)
            if part.ndim != 1:
                raise ValueError(
                    f"`{name}` of a feature must have shape [length], got {tuple(part.shape)}."
                )
            parts[name] = part.tolist()
    if "input_ids" not in parts:
        raise ValueError("`input_ids` of a feature must be token ids, got None.")
    return parts


def _is_noised(feature: Mapping[str, list[int]]) -> bool:
    """Whether labels tell what is hidden; those of a text are its tokens, or -100."""
    ids, labels = feature["input_ids"], feature.get("labels")
    return labels is not None and any(
        label not in (IGNORED, token) for token, label in zip(ids, labels, strict=False)
    )
