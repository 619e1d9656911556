"""Windows of text under noise, and what the backbone predicted of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ...circuits import CoupledCategorical, DenseEvidence, Preceding, TopKEvidence
from ...modeling_head import CoDDHead

DENSE_VOCABULARY = 16384
"""Up to this many tokens evidence is laid out in full: one product is faster than many gathers."""

BY_WINDOW = ("tokens", "masked", "level", "hidden", "preceding_tokens", "preceding_hidden")
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
        held = (getattr(self, f.name) for f in fields(self))
        return sum(t.nbytes for t in held if t is not None)

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        return NoisedWindows.gathered([self], [rows])

    @classmethod
    def gathered(
        cls, parts: Sequence[NoisedWindows], rows: Sequence[torch.Tensor]
    ) -> NoisedWindows:
        """Some windows of each of some parts, read once and written once."""
        counts, places = [], []
        for part, own in zip(parts, rows, strict=True):
            begins = part.offsets[own].long()
            count = part.offsets[own + 1].long() - begins
            shift = begins - (count.cumsum(0) - count)
            places.append(torch.arange(int(count.sum())) + shift.repeat_interleave(count))
            counts.append(count)
        counts = torch.cat(counts)
        columns = {"offsets": torch.cat((counts.new_zeros(1), counts.cumsum(0)))}
        for names, wanted in ((BY_WINDOW, rows), (BY_MASKED_POSITION, places)):
            ends = torch.tensor([len(own) for own in wanted]).cumsum(0).tolist()
            for name in names:
                first = getattr(parts[0], name)
                columns[name] = None
                if first is not None:
                    columns[name] = out = first.new_empty(ends[-1], *first.shape[1:])
                    for part, own, end in zip(parts, wanted, ends, strict=True):
                        slot = out[end - len(own) : end]
                        torch.index_select(getattr(part, name), 0, own, out=slot)
        return cls(**columns)

    @classmethod
    def joined(cls, parts: Sequence[NoisedWindows]) -> NoisedWindows:
        """All windows of some parts, in order."""
        columns = {}
        for field in fields(cls):
            tensors = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if tensors[0] is None else torch.cat(tensors)
        counts = torch.cat([part.offsets.diff() for part in parts]).long()
        columns["offsets"] = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return cls(**columns)

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
