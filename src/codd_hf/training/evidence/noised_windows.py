"""Windows of text under noise, and the predictions of a backbone about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...circuits import CoupledCategorical, DenseEvidence, ListedEvidence, Preceding, TokenGroups
from ...modeling_head import CoDDHead
from ...runtime.files import atomic_write
from .scores import WindowScores

DENSE_VOCABULARY = 16384
"""Up to this many tokens evidence is laid out in full: one product is faster than many gathers."""

BY_MASKED_POSITION = ("indices", "log_probs", "log_rest")


@dataclass
class NoisedWindows:
    """`N` noised windows of length `L`, with `M` masked positions in all.

    Attributes:
        tokens: `[N, L]` int32, the true tokens.
        masked: `[N, L]` bool, the positions that were hidden from the backbone.
        level: `[N]`, the probability with which they were.
        indices: `[M, k]` int32, likeliest tokens of the masked positions, window by window.
        log_probs: `[M, k]` float16, their log-probabilities (off by at most 1/2048 of themselves).
        log_rest: `[M]`, log of the remaining mass.
        hidden: `[N, L, d]` bfloat16, the hidden states that predict the window's tokens, for a head
            with conditioning.
        preceding_tokens: `[N, C]` int32, the visible tokens before the window, -1 where there is
            none, for a head with "copy" conditioning.
        preceding_hidden: `[N, C, d]`, the hidden states that predict them.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    level: torch.Tensor
    indices: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor
    hidden: torch.Tensor | None = None
    preceding_tokens: torch.Tensor | None = None
    preceding_hidden: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        """The tensors that there are."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.columns.values())

    @cached_property
    def offsets(self) -> torch.Tensor:
        """`[N + 1]`, where each window's masked positions begin and end among all `M`."""
        counts = self.masked.sum(1)
        return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        ends = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        places = torch.cat([torch.arange(*pair) for pair in ends])
        return NoisedWindows(
            **{
                name: tensor[places if name in BY_MASKED_POSITION else rows]
                for name, tensor in self.columns.items()
            }
        )

    @classmethod
    def joined(cls, parts: Sequence[NoisedWindows]) -> NoisedWindows:
        """All windows of some parts, in order."""
        columns = [part.columns for part in parts]
        return cls(**{name: torch.cat([c[name] for c in columns]) for name in columns[0]})

    def write(self, path: Path) -> None:
        """Writes them to a file; a kill leaves all of it or nothing."""
        with atomic_write(path) as new:
            save_file(self.columns, new)

    @classmethod
    def read(cls, path: Path) -> NoisedWindows:
        """Maps a file that `write` wrote into memory: only rows that are taken are read.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise ValueError(
                f"The evidence in {str(path)!r} is damaged ({error}): delete the folder, and it is "
                "written anew."
            ) from error

    def distribution(self, head: CoDDHead, temperature: float) -> CoupledCategorical:
        """Their coupled distributions, at the temperature that the predictions were made at."""
        device = head.device

        def laid_out(values: torch.Tensor, fill: float) -> torch.Tensor:
            out = values.new_full((*self.masked.shape, *values.shape[1:]), fill)
            out[self.masked] = values
            return out.to(device)

        # Half precision costs a prediction its normalisation.
        kept = torch.cat((self.log_probs, self.log_rest[:, None]), -1).float().log_softmax(-1)
        evidence = ListedEvidence(
            laid_out(self.indices.long(), 0),
            laid_out(kept[:, :-1], 0),
            laid_out(kept[:, -1:], -torch.inf),
            temperature,
        )
        if head.config.vocab_size <= DENSE_VOCABULARY:
            dense = evidence.spread(TokenGroups(head.log_spread)).dense()
            evidence = DenseEvidence(dense, temperature)
        preceding = None
        if self.preceding_tokens is not None:
            before = self.preceding_tokens.long().to(device)
            hidden = self.preceding_hidden.to(device)
            preceding = Preceding(before.clamp(min=0), before >= 0, hidden)
        return head(
            evidence,
            tokens=self.tokens.long().to(device),
            observed=~self.masked.to(device),
            last_hidden_state=None if self.hidden is None else self.hidden.to(device),
            temperature=temperature,
            preceding=preceding,
        )

    def scores(self, head: CoDDHead, temperature: float) -> WindowScores:
        """The gains of a head over the factorized predictions."""
        distribution = self.distribution(head, temperature)
        gain = distribution.coupling_gain(self.tokens.long().to(head.device))
        masked = distribution.masked.sum(1)
        return WindowScores(self.level.to(head.device), masked, gain, torch.zeros_like(gain))
