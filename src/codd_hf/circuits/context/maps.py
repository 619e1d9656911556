r"""Context: how the backbone's hidden states steer the circuit (CoDD, Appendix E, future work).

Every map only rescales potentials or adds latents, so every query stays exact:

- *latent*: a factor `c_i(z) = exp(W x_i + b)_z` on the latents of every position;
- *copy*: a copy state for each token before the window (`copies.py`), begun with weight
  `exp(q(x_i) . k(y_j) + b)` and followed by the next one with `exp(q'(x_i) . k'(y_j) + b')`; `y_j`
  is the hidden state that predicts that token.

`x_i` is the hidden state that predicts token `i`, scaled to unit root mean square, and, if asked
for, the noise level. All maps start as no-ops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .copies import CopyStates

COPY_LIMIT = 4.0
"""Largest log-weight of beginning to copy, and of following."""

COPY_FLOOR = -16.5
"""Smallest log-weight of beginning to copy; with it, copying is all but a no-op."""

EMITTED_FLOOR = -10.0
"""Smallest `log p(x_j | z)` with which a copy state of `x_j` is entered."""

SUGGESTED_STATES = 8
"""How many states a copied token suggests; their share of `p(z | x)` is nearly all of it."""

LARGEST_WEIGHT = 12.0
"""Largest log-potential with which a copy state emits its token."""

COPY_START = -3.0
"""Log-weight of beginning to copy at which a fit begins (from a no-op it would take long)."""


@dataclass(frozen=True)
class Context:
    """What the backbone says about the latents of a batch of windows.

    Attributes:
        latent: `[B, L, H]`, log of a factor on the latents at every position.
        copies: further latents that copy the tokens before the windows.
    """

    latent: torch.Tensor | None = None
    copies: CopyStates | None = None


@dataclass(frozen=True)
class Preceding:
    """The visible tokens before a batch of windows, in order.

    Attributes:
        tokens: `[B, C]`.
        present: `[B, C]` bool, False where there is no token, or a masked one.
        hidden: `[B, C, d]`, the hidden states that predict them.
    """

    tokens: torch.Tensor
    present: torch.Tensor
    hidden: torch.Tensor

    def packed(self) -> Preceding:
        """The same with most of what is not present left out, which would only be worked on.

        One place stays behind each stretch of tokens: the last of them and the first of the next
        stretch do not follow each other.
        """
        kept = self.present | self.present.roll(1, 1)
        number = max(int(kept.sum(1).max()), 1)
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :number]
        rows = torch.arange(len(order), device=order.device)[:, None]
        return Preceding(*(t[rows, order] for t in (self.tokens, self.present, self.hidden)))


class HeadLinear(nn.Module):
    """`y = x W^T + b`, but no `torch.nn.Linear`.

    Libraries find those in a model and put theirs into their place: an adapter ("all-linear" in
    PEFT) or weights of few bits, which are meant for the backbone.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`."""
        return F.linear(inputs, self.weight, self.bias)


class ContextMaps(nn.Module):
    """The maps from hidden states to [`Context`].

    Args:
        conditioning: any of `"latent"`, `"copy"`.
        noise_conditioning: the share of the window that is masked is an input as well.
        context_size: size `d` of the hidden states.
        num_latents: number of latent states `H`.
        vocab_size: number of tokens.
        copy_size: size of the queries and keys of `"copy"`.
    """

    def __init__(
        self,
        conditioning: list[str],
        noise_conditioning: bool,
        context_size: int,
        num_latents: int,
        vocab_size: int,
        copy_size: int,
    ):
        super().__init__()
        self.noise_conditioning = noise_conditioning
        size = context_size + (2 if noise_conditioning else 0)
        self.latent = HeadLinear(size, num_latents) if "latent" in conditioning else None
        self.copies = "copy" in conditioning
        if not self.copies:
            return
        self.query = HeadLinear(size, copy_size, bias=False)
        self.key = HeadLinear(context_size, copy_size, bias=False)
        self.copy_bias = nn.Parameter(torch.empty(1))
        self.follow_query = HeadLinear(size, copy_size, bias=False)
        self.follow_key = HeadLinear(context_size, copy_size, bias=False)
        self.follow_bias = nn.Parameter(torch.empty(1))
        # Fixed, as the generative circuit has them: the conditional fit bends the emissions away
        # from probabilities, and its gradient would cost more than all the rest of a step.
        shape = (vocab_size, min(SUGGESTED_STATES, num_latents))
        states = torch.int16 if num_latents < 1 << 15 else torch.int32
        self.register_buffer("suggested", torch.empty(shape, dtype=states))
        self.register_buffer("log_suggested", torch.empty(shape))
        self.register_buffer("log_occupancy", torch.empty(num_latents))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Makes every map a no-op; what transformers has loaded from a file stays."""
        values = {}
        if self.latent is not None:
            values = {self.latent.weight: 0, self.latent.bias: 0}
        if self.copies:
            for map_ in (self.query, self.key, self.follow_query, self.follow_key):
                values[map_.weight] = None  # ranks must differ for their gradients to differ
            number, states = self.suggested.shape[1], len(self.log_occupancy)
            values |= {self.copy_bias: COPY_FLOOR, self.follow_bias: 0}
            values |= {self.suggested: torch.arange(number), self.log_suggested: -math.log(number)}
            values |= {self.log_occupancy: -math.log(states)}
        for tensor, value in values.items():
            # transformers marks what it has read from a file. `torch.nn.init` heeds the mark only
            # while transformers has replaced its functions, for the whole process, which it undoes
            # when any other model is made in another thread.
            if getattr(tensor, "_is_hf_initialized", False):
                continue
            if value is None:
                tensor.normal_(std=0.02)
            else:
                tensor.copy_(torch.as_tensor(value))

    @torch.no_grad()
    def start(self, log_emitted: torch.Tensor, occupancy: torch.Tensor) -> None:
        """Where a fit begins if it is not to take long: copying is a little more than a no-op.

        Args:
            log_emitted: `[H, V]`, `log p(v | z)` of the generative circuit.
            occupancy: `[H]`, how often it is in each state.
        """
        if not self.copies:
            return
        self.copy_bias.fill_(COPY_START)
        self.log_occupancy.copy_(occupancy.clamp(min=1e-6).log())
        joint = log_emitted.T + self.log_occupancy
        likeliest = joint.log_softmax(-1).topk(self.suggested.shape[1], -1)
        self.suggested.copy_(likeliest.indices)
        self.log_suggested.copy_(likeliest.values.log_softmax(-1))

    def forward(
        self,
        hidden: torch.Tensor,
        masked: torch.Tensor,
        present: torch.Tensor | None,
        preceding: Preceding | None,
        log_marginal: torch.Tensor,
        alpha: float,
    ) -> Context:
        """Context of a batch of windows.

        Args:
            hidden: `[B, L, d]`, the hidden states that predict the window's tokens.
            masked: `[B, L]` bool, the masked positions; only their share matters.
            present: `[B, L]` bool; None where all positions are.
            preceding: the tokens before the windows, for `"copy"`.
            log_marginal: `[V]`, log of the token marginal, for `"copy"`.
            alpha: the power of it that the emissions were divided by.
        """
        inputs = _scaled(hidden, self.latent.weight if self.latent else self.copy_bias)
        if self.noise_conditioning:
            length = masked.shape[1] if present is None else present.sum(1).clamp(min=1)
            level = (masked.sum(1) / length).to(inputs.dtype)
            level = torch.stack((level, level * level), -1)[:, None]
            inputs = torch.cat((inputs, level.expand(-1, inputs.shape[1], -1)), -1)
        latent = None if self.latent is None else self.latent(inputs)
        if not self.copies:
            return Context(latent)
        keys, present = _scaled(preceding.hidden, inputs), preceding.present[:, None]
        start = self.query(inputs) @ self.key(keys).transpose(1, 2) + self.copy_bias
        follow = self.follow_query(inputs) @ self.follow_key(keys).transpose(1, 2)
        tokens, apart = preceding.tokens, ~(present & present.roll(1, -1))
        left = inputs.new_full((*tokens.shape, len(self.log_occupancy)), -torch.inf)
        values = self.log_suggested[tokens].to(left.dtype)
        left = left.scatter(-1, self.suggested[tokens].long(), values)
        log_marginal = log_marginal[tokens]
        emitted = left + log_marginal[..., None] - self.log_occupancy  # p(x | z) by Bayes' rule
        copies = CopyStates(
            tokens=tokens,
            start=_below(COPY_LIMIT, start).clamp(min=COPY_FLOOR).masked_fill(~present, -torch.inf),
            follow=_below(COPY_LIMIT, follow + self.follow_bias).masked_fill(apart, -torch.inf),
            emitted=emitted.clamp(EMITTED_FLOOR, 0),
            left=left,
            weight=(-alpha * log_marginal).clamp(max=LARGEST_WEIGHT),
            limits=(COPY_FLOOR + EMITTED_FLOOR, COPY_LIMIT),
        )
        return Context(latent, copies)


def _scaled(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Hidden states at unit root mean square."""
    return F.rms_norm(hidden.to(like.dtype), hidden.shape[-1:])


def _below(limit: float, x: torch.Tensor) -> torch.Tensor:
    """`x`, smoothly kept below `limit`."""
    return limit - F.softplus(limit - x)
