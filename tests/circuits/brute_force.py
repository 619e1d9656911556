r"""The coupled distribution by enumeration, in float64, straight from its definition.

    w(x, z) = pi(z_1) c_1(z_1) E_1(z_1, x_1) \prod_{i>1} A_i(z_{i-1}, z_i) c_i(z_i) E_i(z_i, x_i)
              \prod_{i in M} phi_i(x_i)

over every sequence of tokens and every path of latents, with

    log E(z, v) = <U_z, P W_out(v)> + b_v                      tied emissions
    phi(v) = r u(v) / (1 - u(T))    for v outside the list T   top-k evidence

Copy states are `J` more latents in each row:

    A'_i(z, j) = start_{ij} \sum_z' A_i(z, z') m_j(z')
    A'_i(j, s) = \sum_z l_j(z) A'_i(z, s) + follow_{is} [s = j + 1]
    pi'_i(j) = start_{ij} \sum_z pi(z) m_j(z)    at the first present position i
    E(j, v) = e_j [v = x_j]

It shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch.nn.functional import one_hot

from codd_hf.circuits import (
    Context,
    CopyStates,
    CoupledCategorical,
    ListedEvidence,
    Potentials,
    TiedEmission,
)

LEAVES = ["logits", "initial", "transition", "emission", "latents", "projection", "bias"]
LEAVES += ["start", "follow", "emitted", "out", "copy_weight"]
"""The fields that a distribution is differentiable in (and the context, which is an option)."""


@dataclass
class Case:
    """The arguments of one coupled distribution.

    Attributes:
        logits: `[B, L, V]`.
        initial: `[H]`.
        transition: `[1 or L-1, H, H]`.
        emission: `[1 or L, H, V]`; None where the emissions are tied.
        options: of `CoupledCategorical`; `context` is the tensor of the latents.
        latents: `[H, r]`, tied emissions.
        projection: `[r, d]`, likewise.
        bias: `[V]`, likewise.
        embedding: `[V, d]`, `W_out`, which is frozen.
        copied: `[B, J]`, the tokens of copy states.
        start: `[B, L, J]`, log-weights of beginning to copy.
        follow: `[B, L, J]`, of coming from the copy state before.
        emitted: `[B, J, H]`, `log m_j`.
        out: `[B, J, H]`, `log l_j`.
        copy_weight: `[B, J]`, `log e_j`.
        copy_limits: of `CopyStates`.
        top_k: how many tokens the evidence lists; None for logits.
        log_marginal: `[V]`, by which the rest of the mass is spread, up to a constant;
            -inf for forbidden tokens.
        grouped: whether the rest is spread group by group.
    """

    logits: torch.Tensor
    initial: torch.Tensor
    transition: torch.Tensor
    emission: torch.Tensor | None = None
    options: dict = field(default_factory=dict)
    latents: torch.Tensor | None = None
    projection: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    copied: torch.Tensor | None = None
    start: torch.Tensor | None = None
    follow: torch.Tensor | None = None
    emitted: torch.Tensor | None = None
    out: torch.Tensor | None = None
    copy_weight: torch.Tensor | None = None
    copy_limits: tuple[float, float] | None = None
    top_k: int | None = None
    log_marginal: torch.Tensor | None = None
    grouped: bool = False

    def distribution(self, dtype: torch.dtype = torch.float32) -> CoupledCategorical:
        """Ours, with the circuit (and the context) in `dtype` and the logits as they are."""

        def cast(tensor):
            return None if tensor is None else tensor.to(dtype)

        options = dict(self.options)
        if self.copied is not None:
            parts = (cast(getattr(self, name)) for name in LEAVES[-5:])
            copies = CopyStates(self.copied, *parts, self.copy_limits)
            options["context"] = Context(cast(options.get("context")), copies)
        elif options.get("context") is not None:
            options["context"] = cast(options["context"])
        return CoupledCategorical(self.prediction(dtype), self.circuit(dtype), **options)

    def circuit(self, dtype: torch.dtype = torch.float32) -> Potentials:
        """Our circuit."""
        transition = self.transition.to(dtype)
        if self.emission is None:
            embedding = self.embedding.to(dtype) @ self.projection.to(dtype).T
            emission = TiedEmission(self.latents.to(dtype), embedding, self.bias.to(dtype))
        else:
            emission = self.emission.to(dtype)
        marginal = None
        if self.log_marginal is not None:
            marginal = self.log_marginal.to(dtype).log_softmax(-1)
        return Potentials(self.initial.to(dtype), transition, emission, marginal)

    def prediction(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | ListedEvidence:
        """Our evidence: the logits as they are, or a list made of them."""
        if self.top_k is None:
            return self.logits
        temperature = self.options.get("temperature", 1.0)
        forbidden = self.options.get("forbidden")
        logits = self.logits.to(dtype)
        how = (self.top_k, temperature, forbidden)
        groups = self.circuit(dtype).groups if self.grouped else None
        return ListedEvidence.from_logits(logits, *how, groups)

    def leaves(self) -> dict[str, torch.Tensor]:
        """Everything that a distribution is differentiable in, by name."""
        named = {name: getattr(self, name) for name in LEAVES}
        named["context"] = self.options.get("context")
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_leaves(self, leaves: dict[str, torch.Tensor]) -> Case:
        """The same with other tensors under those names."""
        fields = dict(leaves)
        context = fields.pop("context", None)
        options = self.options if context is None else self.options | {"context": context}
        return replace(self, options=options, **fields)

    def log_step(self, row: int, i: int) -> torch.Tensor:
        """`[H, H]` log of `A_i` in a row, the step into position `i`, as its formula says."""
        states = len(self.initial)
        step = self.transition[i - 1 if len(self.transition) > 1 else 0].double()
        if self.copied is None:
            return step
        emitted, out = self.emitted[row].double(), self.out[row].double()
        start, follow = self.start[row, i].double(), self.follow[row, i].double()
        to_copies = [(step + emitted[j]).logsumexp(1) + start[j] for j in range(len(start))]
        of_states = torch.cat((step, torch.stack(to_copies, 1)), 1)  # [H, H + J]
        of_copies = []
        for j in range(len(start)):
            leaving = (out[j][:, None] + of_states).logsumexp(0)
            if j + 1 < len(start):
                to = one_hot(torch.tensor(states + j + 1), len(leaving)).bool()
                on = torch.where(to, follow[j + 1], -torch.inf)
                leaving = torch.stack((leaving, on)).logsumexp(0)
            of_copies.append(leaving)
        return torch.cat((of_states, torch.stack(of_copies)))

    def log_initial(self, row: int, i: int) -> torch.Tensor:
        """`[H]`, or `[H + J]` with copy states, of a row that starts at position `i`."""
        initial = self.initial.double()
        if self.copied is None:
            return initial
        entered = (initial + self.emitted[row].double()).logsumexp(1)
        return torch.cat((initial, entered + self.start[row, i].double()))

    def log_emission(self, row: int, i: int) -> torch.Tensor:
        """`[H, V]`, or `[H + J, V]` with copy states, log of `E_i`."""
        if self.emission is not None:
            emission = self.emission[i if len(self.emission) > 1 else 0].double()
        else:
            projected = self.projection.double() @ self.embedding.double().T  # [r, V]
            emission = self.latents.double() @ projected + self.bias.double()
        if self.copied is None:
            return emission
        emits = one_hot(self.copied[row], emission.shape[1]).bool()
        weight = self.copy_weight[row].double()[:, None]
        return torch.cat((emission, torch.where(emits, weight, -torch.inf)))

    def log_phi(self, row: int) -> torch.Tensor:
        """`[L, V]` log of the backbone's prediction."""
        logits, forbidden = self.logits[row].double(), self.options.get("forbidden")
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -torch.inf)
        log_phi = (logits / self.options.get("temperature", 1.0)).log_softmax(-1)
        if self.top_k is None or self.top_k == log_phi.shape[-1]:
            return log_phi
        laws = []
        for law in log_phi:
            listed = torch.zeros_like(law, dtype=torch.bool)
            listed[law.topk(self.top_k).indices] = True
            marginal = self.log_marginal.double()
            best = self.circuit().emission.dense()[0].argmax(0)
            for group in best.unique() if self.grouped else [None]:
                others = ~listed if group is None else ~listed & (best == group)
                share = marginal[others].log_softmax(0).nan_to_num(-torch.inf, neginf=-torch.inf)
                law = law.masked_scatter(others, law[others].logsumexp(0) + share)
            laws.append(law)
        return torch.stack(laws)

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, rows: list[int]) -> Case:
        """The same with some rows only, in that order."""
        by_row = ("tokens", "observed", "present", "context", "active")
        options = {k: v[rows] if k in by_row else v for k, v in self.options.items()}
        held = {name: getattr(self, name) for name in ("logits", "copied", *LEAVES[-5:])}
        held = {name: tensor[rows] for name, tensor in held.items() if tensor is not None}
        return replace(self, options=options, **held)

    def enumerate(self, row: int) -> Enumeration:
        return Enumeration(self, row)


class Enumeration:
    """All completions and all latent paths of one row.

    Attributes:
        positions: the present positions; the enumeration covers these `n` only.
        tokens: `[X, n]` every token sequence.
        latents: `[Z, n]` every latent path.
        log_weight: `[X, Z]` float64 log of `w(x, z)`; -inf where `x` contradicts an observation.
        log_circuit: `[X, Z]` the same without `phi`.
        log_phi: `[L, V]`.
    """

    def __init__(self, case: Case, row: int):
        length, vocab = case.logits.shape[1:]
        own = len(case.initial)
        states = own + (0 if case.copied is None else case.copied.shape[1])

        def option(name, default):
            value = case.options.get(name)
            return default if value is None else value[row]

        present = option("present", torch.ones(length, dtype=torch.bool))
        observed = option("observed", torch.zeros(length, dtype=torch.bool))
        given = option("tokens", torch.zeros(length, dtype=torch.long))
        context = option("context", torch.zeros(length, own)).double()
        context = torch.cat((context, torch.zeros(length, states - own)), 1)
        active = bool(option("active", torch.tensor(True)))

        self.log_phi = case.log_phi(row)
        self.length, self.vocab, self.states = length, vocab, states
        self.positions = present.nonzero()[:, 0].tolist()
        n = len(self.positions)
        self.tokens = torch.tensor(list(product(range(vocab), repeat=n)), dtype=torch.long)
        self.latents = torch.tensor(list(product(range(states), repeat=n)), dtype=torch.long)
        x, z = self.tokens, self.latents

        circuit = torch.zeros(len(x), len(z), dtype=torch.float64)
        factorized = torch.zeros(len(x), dtype=torch.float64)
        possible = torch.ones(len(x), dtype=torch.bool)
        for k, i in enumerate(self.positions):
            if active:
                if k == 0:
                    circuit = circuit + case.log_initial(row, i)[z[:, 0]]
                else:
                    circuit = circuit + case.log_step(row, i)[z[:, k - 1], z[:, k]]
                circuit = circuit + context[i, z[:, k]]
                circuit = circuit + case.log_emission(row, i)[z[:, k]][:, x[:, k]].T
            if observed[i]:
                possible = possible & (x[:, k] == given[i])
            else:
                factorized = factorized + self.log_phi[i, x[:, k]]
        self.observed = [bool(observed[i]) for i in self.positions]
        self.log_circuit = circuit
        self.log_factorized = factorized
        weight = circuit + factorized[:, None]
        self.log_weight = weight.masked_fill(~possible[:, None], -torch.inf)

    @property
    def log_partition(self) -> torch.Tensor:
        return self.log_weight.flatten().logsumexp(0)

    @property
    def log_prob(self) -> torch.Tensor:
        """`[X]`."""
        return self.log_weight.logsumexp(1) - self.log_partition

    def log_prob_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of tokens `[L]`, with clean gradients where other tokens have none."""
        at = (self.tokens == tokens[self.positions]).all(1)
        return self.log_weight[at].flatten().logsumexp(0) - self.log_partition

    @property
    def coupling_gain(self) -> torch.Tensor:
        """`[X]` log p_w(x) - log Z."""
        return self.log_circuit.logsumexp(1) - self.log_partition

    @property
    def path_prob(self) -> torch.Tensor:
        """`[Z]` probability of each latent path."""
        return (self.log_weight.logsumexp(0) - self.log_partition).exp()

    @property
    def marginals(self) -> torch.Tensor:
        """`[n, V]`."""
        law = one_hot(self.tokens, self.vocab).double()  # [X, n, V]
        return torch.einsum("x,xnv->nv", self.log_prob.exp(), law)

    @property
    def latent_posterior(self) -> torch.Tensor:
        """`[n, H]`."""
        law = one_hot(self.latents, self.states).double()
        return torch.einsum("z,znh->nh", self.path_prob, law)

    @property
    def best(self) -> torch.Tensor:
        """Log-probability of the best pair of tokens and latents."""
        return self.log_weight.max() - self.log_partition

    def pair_log_prob(self, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Log-probability of given tokens `[L]` and latents `[L]`."""
        x = (self.tokens == tokens[self.positions]).all(1)
        z = (self.latents == latents[self.positions]).all(1)
        return self.log_weight[x][:, z].squeeze() - self.log_partition

    def law_given(self, latents: torch.Tensor) -> torch.Tensor:
        """`[n, V]` law of each token given the latents `[L]`."""
        z = (self.latents == latents[self.positions]).all(1)
        weight = self.log_weight[:, z][:, 0]
        law = one_hot(self.tokens, self.vocab).double()
        return torch.einsum("x,xnv->nv", weight.softmax(0), law)

    def on_canvas(self, items: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Spreads `[X, n]` over the `L` positions of the window."""
        canvas = torch.full((len(items), self.length), fill)
        canvas[:, self.positions] = items
        return canvas

    @property
    def rounding(self) -> float:
        """What float32 rounding of the largest log-weight that matters does to a probability."""
        weight = self.log_weight.detach()
        parts = self.log_circuit.detach()
        largest = torch.cat([weight.flatten(), parts.flatten()])
        largest = largest[largest > -torch.inf].abs()
        return float(largest.max()) * 2.0**-22 if len(largest) else 0.0
