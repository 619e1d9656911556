r"""Context: how the backbone's hidden states steer the circuit (CoDD, Appendix E, future work).

Every map only rescales potentials or adds latents, so every query stays exact; all start as no-ops.

- *latent*: a factor `c_i(z) = exp(W x_i + b)_z` on the latents of every position;
- *copy*: `J` more latents, one for each token `x_j` before the window, in order. Latent `j` emits
  `x_j` and nothing else, with potential `e_j`. Otherwise it behaves as the states that `x_j`
  suggests, except that the next copy state may follow it directly:

    A'(z, z') = A(z, z')
    A'(z, j)  = start_{ij} \sum_z' A(z, z') m_j(z')               into copying
    A'(j, s)  = \sum_z l_j(z) A'(z, s) + follow_{is} [s = j + 1]  out of it, or on

with `m_j(z) = p(x_j | z)`, `l_j(z) = p(z | x_j)`, `start_{ij} = exp(q(x_i) . k(y_j) + b)` and
`follow` likewise. A step costs `O(H J)` more. Pointer networks (arXiv 1506.03134) copy in this way;
here copying is a part of the latent path, which is summed over exactly.

`x_i` and `y_j` are the hidden states that predict the tokens, scaled to unit root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

from ..evidence.dense import Batched
from ..potentials.circuit import StepTransitions
from ..recursions.chain import logsumexp, safe_log

COPY_FLOOR, COPY_LIMIT = -16.5, 4.0
"""Log-weights of beginning to copy: all but a no-op, and the largest, that of following too."""

COPY_START = -3.0
"""Log-weight of beginning to copy at which a fit begins (from a no-op it would take long)."""

EMITTED_FLOOR, LARGEST_WEIGHT = -10.0, 12.0
"""Smallest `log m_j(z)`, and largest `log e_j`."""

SUGGESTED_STATES = 8
"""How many states a copied token suggests; their share of `p(z | x)` is nearly all of it."""


@dataclass(frozen=True)
class CopyStates(Batched):
    """The copy states of a batch; all but `tokens` are log-potentials.

    Attributes:
        tokens: `[B, J]`, what they emit.
        start: `[B, L, J]`, of beginning to copy there, at every position.
        follow: `[B, L, J]`, of coming from the copy state before; entry `j = 0` has no meaning.
        emitted: `[B, J, H]`, `log m_j(z)`, at most 0.
        left: `[B, J, H]`, `log l_j(z)`, at most 0.
        weight: `[B, J]`, `log e_j`.
        limits: if known, the least `start + emitted` (where there is a token) and the largest of it
            and `follow`, where every `l_j` adds up to 1.
    """

    tokens: torch.Tensor
    start: torch.Tensor
    follow: torch.Tensor
    emitted: torch.Tensor
    left: torch.Tensor
    weight: torch.Tensor
    limits: tuple[float, float] | None = None

    def to(self, dtype: torch.dtype) -> CopyStates:
        """The same with log-potentials of a dtype."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def initial(self, log_initial: torch.Tensor) -> torch.Tensor:
        """`[B, L, H + J]` log-potentials of a chain that starts at a position, from `[H]`."""
        batch, length, _ = self.start.shape
        entered = logsumexp(log_initial + self.emitted, -1)[:, None] + self.start
        return torch.cat((log_initial.expand(batch, length, -1), entered), -1)

    def soft_evidence(self, log_prob_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`[B, L, J]` log-evidence of a prediction, which gives that of tokens `[J, B, L]`."""
        batch, length, number = self.start.shape
        tokens = self.tokens.T[..., None].expand(number, batch, length)
        return log_prob_of(tokens).movedim(0, -1) + self.weight[:, None]


class CopySteps:
    """[`StepTransitions`] over `H + J` states, of those of the circuit and copy states."""

    def __init__(self, inner: StepTransitions, copies: CopyStates) -> None:
        self.inner, self.copies = inner, copies
        self._held: torch.Tensor | None = None
        self.batch, length, _ = copies.start.shape
        self.num_latents = copies.emitted.shape[-1]
        inner_scale = inner.log_scales(length, self.batch).expand(-1, self.batch)  # [L - 1, B]
        inner_scale = F.pad(inner_scale, (0, 0, 1, 0))  # [L, B]
        start = copies.start.transpose(0, 1)[:, :, None]  # [L, B, 1, J]
        follow = copies.follow.transpose(0, 1)[:, :, None, 1:]
        self.scale = inner_scale + start.detach().amax((2, 3)).clamp(min=0)
        if follow.shape[-1]:
            self.scale = torch.maximum(self.scale, follow.detach().amax((2, 3)))
        share = (inner_scale - self.scale)[..., None, None]
        self.share = share.exp().unbind(0)  # L times [B, 1, 1], of the circuit's own transitions
        self.start = (start + share).exp().unbind(0)  # [B, 1, J]
        self.follow = (follow - self.scale[..., None, None]).exp().unbind(0)  # [B, 1, J - 1]
        self.emitted, self.left = copies.emitted.exp(), copies.left.exp()

    def to(self, dtype: torch.dtype) -> CopySteps:
        """The same in another dtype; itself if that is its dtype."""
        same = self.emitted.dtype == dtype
        return self if same else CopySteps(self.inner.to(dtype), self.copies.to(dtype))

    @cached_property
    def log_range(self) -> float:
        """As that of `StepTransitions`, for the entries that every state has."""
        if self.copies.limits is None:
            return math.inf
        # Following is of one state alone: the next one can be begun anew, which is not rarer.
        low, high = self.copies.limits
        smallest, largest, fewest, most = self.inner.bounds
        log_range = max(largest, high + max(most, 0.0)) - min(smallest, low + fewest)
        return math.inf if math.isnan(log_range) else log_range

    def log_scales(self, length: int, batch: int) -> torch.Tensor:
        """As those of `StepTransitions`."""
        return self.scale[1:].repeat(1, batch // self.scale.shape[1])

    def _split(self, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S * B, H + J]` as `[B, S, H]` and `[B, S, J]`."""
        parts = vector.unflatten(0, (-1, self.batch)).transpose(0, 1)
        return parts[..., : self.num_latents], parts[..., self.num_latents :]

    def _through(
        self, move: Callable[[torch.Tensor, int], torch.Tensor], own: torch.Tensor, position: int
    ) -> torch.Tensor:
        """`inner.forward` or `inner.backward` of `[B, S, H]`."""
        moved = move(own.transpose(0, 1).flatten(0, 1), position)
        return moved.unflatten(0, (-1, self.batch)).transpose(0, 1)

    def forward(self, message: torch.Tensor, position: int) -> torch.Tensor:
        """As that of `StepTransitions`."""
        own, copied = self._split(message)
        moved = self._through(self.inner.forward, torch.baddbmm(own, copied, self.left), position)
        entered = (moved @ self.emitted.transpose(1, 2)) * self.start[position]
        entered[..., 1:].addcmul_(copied[..., :-1], self.follow[position])
        return torch.cat((moved * self.share[position], entered), -1).transpose(0, 1).flatten(0, 1)

    def backward(self, weights: torch.Tensor, position: int) -> torch.Tensor:
        """As that of `StepTransitions`."""
        own, copied = self._split(weights)
        entered = copied * self.start[position]
        own = torch.baddbmm(own * self.share[position], entered, self.emitted)
        moved = self._through(self.inner.backward, own, position)
        left = moved @ self.left.transpose(1, 2)
        left[..., :-1].addcmul_(copied[..., 1:], self.follow[position])
        return torch.cat((moved, left), -1).transpose(0, 1).flatten(0, 1)

    def column(self, state: torch.Tensor, position: int) -> torch.Tensor:
        """`A'(., state)`, `[S, B, H + J]`, up to the scale, of states `[S, B]`."""
        size = self.num_latents + self.copies.tokens.shape[1]
        one_hot = F.one_hot(state, size).to(self.emitted.dtype)
        return self.backward(one_hot.flatten(0, 1), position).unflatten(0, state.shape)

    def log_matrix(self, position: int) -> torch.Tensor:
        """`[B, H + J, H + J]`; sums over states in float64."""
        first, start = self.num_latents, self.copies.start[:, position]
        matrix = self._begun_at_no_cost(position)
        matrix = torch.cat((matrix[..., :first], matrix[..., first:] + start[:, None]), -1)
        above = matrix.diagonal(1, -2, -1)
        on = torch.stack((above[:, first:], self.copies.follow[:, position, 1:]))
        above = torch.cat((above[:, :first], logsumexp(on, 0)), -1)
        return matrix.diagonal_scatter(above, 1, -2, -1)

    def _begun_at_no_cost(self, position: int) -> torch.Tensor:
        """`[B, H + J, H + J]`: `log_matrix` without `start` and without following."""
        if self._held is None or self.inner.num_steps > 1:
            copies, inner = self.copies, self.inner.log_matrix(position)
            matrix = inner.expand(self.batch, -1, -1).double()
            entered = _log_product(matrix, copies.emitted.double().transpose(1, 2))
            of_states = torch.cat((matrix, entered), -1)
            of_copies = _log_product(copies.left.double(), of_states)
            self._held = torch.cat((of_states, of_copies), 1).to(inner.dtype)
        return self._held

    def select(self, rows: torch.Tensor) -> CopySteps:
        """The transitions of some rows (of stacked copies of the batch)."""
        return CopySteps(self.inner, self.copies[rows % self.batch])


def _log_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`log(exp(a) @ exp(b))`, `[n, I, K]`."""
    rows, columns = (x.detach().amax(dim, keepdim=True) for x, dim in ((a, -1), (b, -2)))
    rows, columns = (x.masked_fill(x == -torch.inf, 0) for x in (rows, columns))
    return safe_log((a - rows).exp() @ (b - columns).exp()) + rows + columns


@dataclass(frozen=True)
class Context:
    """What the backbone says: `latent` `[B, L, H]`, the log of a factor on latents, and copies."""

    latent: torch.Tensor | None = None
    copies: CopyStates | None = None


@dataclass(frozen=True)
class Preceding(Batched):
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
        """The same without most of what is not present: a place behind each stretch stays."""
        kept = self.present | self.present.roll(1, 1)
        number = max(int(kept.sum(1).max()), 1)
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :number]
        return self[torch.arange(len(order), device=order.device)[:, None], order]


class HeadLinear(nn.Module):
    """No `torch.nn.Linear`, in whose place libraries put adapters or weights of few bits."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`."""
        return F.linear(inputs, self.weight, self.bias)


class ContextMaps(nn.Module):
    """The maps from hidden states to [`Context`], of sizes that the head's configuration names."""

    suggested: torch.Tensor
    log_suggested: torch.Tensor
    log_occupancy: torch.Tensor

    def __init__(
        self,
        conditioning: list[str],
        context_size: int,
        num_latents: int,
        vocab_size: int,
        copy_size: int,
    ) -> None:
        super().__init__()
        self.latent = HeadLinear(context_size, num_latents) if "latent" in conditioning else None
        self.copies = "copy" in conditioning
        if not self.copies:
            return
        self.query = HeadLinear(context_size, copy_size, bias=False)
        self.key = HeadLinear(context_size, copy_size, bias=False)
        self.copy_bias = nn.Parameter(torch.empty(1))
        self.follow_query = HeadLinear(context_size, copy_size, bias=False)
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
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            # transformers marks what it has read from a file. `torch.nn.init` heeds the mark only
            # while transformers has replaced its functions, for the whole process, which it undoes
            # when any other model is made in another thread.
            if getattr(tensor, "_is_hf_initialized", False):
                continue
            if name.endswith(("query.weight", "key.weight")):
                tensor.normal_(std=0.02)  # ranks must differ for their gradients to differ
            elif name == "copy_bias":
                tensor.fill_(COPY_FLOOR)
            elif name == "suggested":
                tensor.copy_(torch.arange(tensor.shape[1]))
            else:  # uniform distributions, and maps to zero
                size = tensor.shape[-1] if name in ("log_suggested", "log_occupancy") else 1
                tensor.fill_(-math.log(size))

    @torch.no_grad()
    def start(self, log_emitted: torch.Tensor, occupancy: torch.Tensor) -> None:
        """Where a fit begins if it is not to take long: copying is a little more than a no-op.

        `log_emitted [H, V]` is `log p(v | z)` of the generative circuit, `occupancy [H]` how often
        it is in each state.
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
        preceding: Preceding | None,
        log_marginal: torch.Tensor,
        alpha: float,
    ) -> Context:
        """Context of windows, of hidden states `[B, L, d]` that predict their tokens.

        For `"copy"`, the emissions were divided by the token marginal to the power `alpha`.
        """
        inputs = _scaled(hidden, self.latent.weight if self.latent else self.copy_bias)
        latent = None if self.latent is None else self.latent(inputs)
        if not self.copies:
            return Context(latent)
        assert preceding is not None
        keys, there = _scaled(preceding.hidden, inputs), preceding.present[:, None]
        start = self.query(inputs) @ self.key(keys).transpose(1, 2) + self.copy_bias
        follow = self.follow_query(inputs) @ self.follow_key(keys).transpose(1, 2)
        tokens, apart = preceding.tokens, ~(there & there.roll(1, -1))
        left = inputs.new_full((*tokens.shape, len(self.log_occupancy)), -torch.inf)
        values = self.log_suggested[tokens].to(left.dtype)
        left = left.scatter(-1, self.suggested[tokens].long(), values)
        log_marginal = log_marginal[tokens]
        emitted = left + log_marginal[..., None] - self.log_occupancy  # p(x | z) by Bayes' rule
        copies = CopyStates(
            tokens=tokens,
            start=_below(COPY_LIMIT, start).clamp(min=COPY_FLOOR).masked_fill(~there, -torch.inf),
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
