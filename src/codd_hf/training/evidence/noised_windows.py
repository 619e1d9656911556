"""Windows of text under noise, and the predictions of a backbone about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...circuits import CoupledCategorical, DenseEvidence, Preceding, TopKEvidence
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
        offsets: `[N + 1]`, where each window's masked positions begin and end among all `M`.
        hidden: `[N, L, d]`, the hidden states that predict the window's tokens; None for a head
            without conditioning.
        preceding_tokens: `[N, C]` int32, the visible tokens before the window, -1 where there is
            none; None for a head without "copy" conditioning.
        preceding_hidden: `[N, C, d]`, the hidden states that predict them.
        indices: `[M, k]` int32, likeliest tokens of the masked positions, window by window.
        log_probs: `[M, k]`, their log-probabilities.
        log_rest: `[M]`, log of the remaining mass.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    level: torch.Tensor
    offsets: torch.Tensor
    hidden: torch.Tensor | None
    preceding_tokens: torch.Tensor | None
    preceding_hidden: torch.Tensor | None
    indices: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in vars(self).values() if tensor is not None)

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        return NoisedWindows.gathered([self], [rows])

    @classmethod
    def gathered(
        cls, parts: Sequence[NoisedWindows], rows: Sequence[torch.Tensor]
    ) -> NoisedWindows:
        """Some windows of each of some parts, read once and written once."""
        counts, places = [], []
        for part, mine in zip(parts, rows, strict=True):
            begins = part.offsets[mine]
            count = part.offsets[mine + 1] - begins
            shift = begins - (count.cumsum(0) - count)
            places.append(torch.arange(int(count.sum())) + shift.repeat_interleave(count))
            counts.append(count)
        columns: dict[str, torch.Tensor | None] = {"offsets": _offsets(torch.cat(counts))}
        for field in fields(cls):
            first = getattr(parts[0], field.name)
            if field.name == "offsets" or first is None:
                columns.setdefault(field.name, None)
                continue
            chosen = places if field.name in BY_MASKED_POSITION else rows
            out = first.new_empty(sum(map(len, chosen)), *first.shape[1:])
            slots = out.split([len(part) for part in chosen])
            for part, index, slot in zip(parts, chosen, slots, strict=True):
                torch.index_select(getattr(part, field.name), 0, index, out=slot)
            columns[field.name] = out
        return cls(**columns)

    @classmethod
    def joined(cls, parts: Sequence[NoisedWindows]) -> NoisedWindows:
        """All windows of some parts, in order."""
        return cls.gathered(parts, [torch.arange(len(part)) for part in parts])

    def write(self, path: Path) -> None:
        """Writes them to a file; a kill leaves all of it or nothing.

        Raises:
            OSError: there is no room.
        """
        with atomic_write(path) as new:
            save_file({name: t for name, t in vars(self).items() if t is not None}, new)

    @classmethod
    def read(cls, path: Path) -> NoisedWindows:
        """Maps what `write` wrote into memory: only rows that are taken are read.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            found = load_file(path)
            return cls(**{field.name: found.pop(field.name, None) for field in fields(cls)})
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The evidence in {str(path)!r} is damaged ({error}): delete the folder, and it is "
                "written anew."
            ) from error

    def distribution(self, head: CoDDHead, temperature: float) -> CoupledCategorical:
        """Their coupled distributions, on the head's device.

        Args:
            head: gives the circuit.
            temperature: the evidence temperature that the predictions were made at.
        """
        device = head.device
        window, column = self.masked.nonzero(as_tuple=True)
        shape = (*self.masked.shape, self.indices.shape[1])
        indices = torch.zeros(shape, dtype=torch.long)
        log_probs = torch.zeros(shape)
        log_rest = torch.full(self.masked.shape, -torch.inf)
        # Half precision costs a prediction its normalisation.
        kept = torch.cat((self.log_probs, self.log_rest[:, None]), -1).float().log_softmax(-1)
        indices[window, column] = self.indices.long()
        log_probs[window, column] = kept[:, :-1]
        log_rest[window, column] = kept[:, -1]
        evidence = TopKEvidence(
            indices.to(device), log_probs.to(device), log_rest.to(device), temperature
        )
        if head.config.vocab_size <= DENSE_VOCABULARY:
            dense = evidence.spread_by(head.log_spread).dense()
            evidence = DenseEvidence(dense, temperature)
        preceding = None
        if self.preceding_tokens is not None:
            before = self.preceding_tokens.long().to(device)
            preceding = Preceding(
                before.clamp(min=0), before >= 0, self.preceding_hidden.to(device)
            )
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


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
