r"""The coupled distribution by enumeration, in float64, straight from its definition.

    w(x, z) = pi(z_1) c_1(z_1) E_1(z_1, x_1) \prod_{i>1} A_i(z_{i-1}, z_i) c_i(z_i) E_i(z_i, x_i)
              \prod_{i in M} phi_i(x_i)

over every sequence of tokens and every path of latents. It shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch.nn.functional import one_hot

from codd_hf.circuits import CoupledCategorical, Potentials


@dataclass
class Case:
    """The arguments of one coupled distribution."""

    logits: torch.Tensor
    initial: torch.Tensor
    transition: torch.Tensor
    emission: torch.Tensor
    options: dict = field(default_factory=dict)

    def distribution(self, dtype: torch.dtype = torch.float32) -> CoupledCategorical:
        """Ours, with the circuit (and the context) in `dtype` and the logits as they are."""
        circuit = Potentials(*(p.to(dtype) for p in self.potentials))
        options = dict(self.options)
        if options.get("context") is not None:
            options["context"] = options["context"].to(dtype)
        return CoupledCategorical(self.logits, circuit, **options)

    @property
    def potentials(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.initial, self.transition, self.emission

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, rows: list[int]) -> Case:
        """The same with some rows only, in that order."""
        by_row = ("tokens", "observed", "present", "context", "active")
        options = {k: v[rows] if k in by_row else v for k, v in self.options.items()}
        return replace(self, logits=self.logits[rows], options=options)

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
        initial, transition, emission = (p.double() for p in case.potentials)
        length, vocab = case.logits.shape[1:]
        states = len(initial)

        def option(name, default):
            value = case.options.get(name)
            return default if value is None else value[row]

        present = option("present", torch.ones(length, dtype=torch.bool))
        observed = option("observed", torch.zeros(length, dtype=torch.bool))
        given = option("tokens", torch.zeros(length, dtype=torch.long))
        context = option("context", torch.zeros(length, states)).double()
        active = bool(option("active", torch.tensor(True)))

        logits = case.logits[row].double()
        if case.options.get("forbidden") is not None:
            logits = logits.masked_fill(case.options["forbidden"], -torch.inf)
        self.log_phi = (logits / case.options.get("temperature", 1.0)).log_softmax(-1)

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
                    circuit = circuit + initial[z[:, 0]]
                else:
                    step = transition[i - 1 if len(transition) > 1 else 0]
                    circuit = circuit + step[z[:, k - 1], z[:, k]]
                circuit = circuit + context[i, z[:, k]]
                emitted = emission[i if len(emission) > 1 else 0]
                circuit = circuit + emitted[z[:, k]][:, x[:, k]].T
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
