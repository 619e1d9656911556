"""The coupled distribution of a whole canvas: windows side by side, every token predicted.

It is what uniform noise asks for. No token of the canvas is known for sure, and none is a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from ..circuits import CoupledCategorical, Generators, shared_information
from .heads import CallHead


@dataclass
class CoupledCanvas:
    """The clean tokens of canvases `[batch, length]`, in windows from the first position on.

    Attributes:
        distribution: over the `[batch * windows, L]` tokens of the windows, of which the last of a
            canvas may be cut short. Its evidence is exact whatever the head's `evidence_size`.
        logits: `[batch, length, vocab]`, the prediction it is made of: the backbone's logits over
            the head's evidence temperature, -inf at forbidden tokens.
    """

    distribution: CoupledCategorical
    logits: torch.Tensor

    @classmethod
    def of(cls, call: CallHead, logits: torch.Tensor, output: Any = None) -> CoupledCanvas:
        """Couples logits `[batch, length, vocab]` by the head of a call.

        The `output` of the backbone holds the hidden states, if the head reads them.
        """
        head, length = call.module, call.window_length
        assert head is not None

        def windows(tensor: torch.Tensor) -> torch.Tensor:
            tensor = F.pad(tensor, (0, 0, 0, -tensor.shape[1] % length))
            return tensor.reshape(-1, length, tensor.shape[2])

        present = None
        if logits.shape[1] % length:
            present = windows(torch.ones_like(logits[..., :1]))[..., 0].bool()
        hidden = windows(output.hidden_states[-1]) if call.reads_states else None
        distribution = head(windows(logits), last_hidden_state=hidden, present=present)
        if distribution.temperature != 1:
            logits = logits / distribution.temperature
        if distribution.forbidden is not None:
            logits = logits.masked_fill(distribution.forbidden, -torch.inf)
        return cls(distribution, logits)

    def joined(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[batch, length, ...]` of a tensor `[batch * windows, L, ...]`."""
        batch, length = self.logits.shape[:2]
        return tensor.reshape(batch, -1, *tensor.shape[2:])[:, :length]

    def logits_given_path(self, generator: Generators = None) -> torch.Tensor:
        """Logits `[batch, length, vocab]` given one joint sample of the latents of each window.

        Tokens are independent then, so that drawing each of them is a joint draw. A head that is
        new adds nothing, to the last bit.
        """
        latents = self.distribution.sample_latents(generator)
        positions = torch.arange(latents.shape[1], device=latents.device)
        emitted = self.distribution.potentials.emission.rows(latents, positions)
        given = self.logits + self.joined(emitted)
        impossible = given.amax(-1, keepdim=True) == -torch.inf
        return torch.where(impossible, self.logits, given) if bool(impossible.any()) else given

    @cached_property
    def marginal_logits(self) -> torch.Tensor:
        """`[batch, length, vocab]`: log-probabilities of each token by itself."""
        return self.joined(self.distribution.marginals).log()

    def shared_information(
        self, ranks: torch.Tensor, num_samples: int, generator: Generators = None
    ) -> torch.Tensor:
        """[`~codd_hf.circuits.shared_information`] of a canvas, by its ranks `[batch, length]`."""
        length = self.distribution.tokens.shape[1]
        last = ranks.shape[1]  # behind all others, where a window is cut short
        ranks = F.pad(ranks, (0, -last % length), value=last)
        ranks = ranks.reshape(-1, length)
        information = shared_information(self.distribution, ranks, num_samples, generator)
        return self.joined(information)
