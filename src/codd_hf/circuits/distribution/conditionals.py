"""Exact conditionals of single tokens: drawn one by one, or each given all the others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...checks.arguments import as_tensor, check_tokens
from ..evidence.dense import mix_tokens
from ..numerics import logsumexp, normalised_exp, safe_log
from ..recursions import chain as chains
from ..recursions.sweep import sweep
from .latents import LatentChain

Draw = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""`draw(position, laws, rows)` draws tokens `[n]` from `laws` `[n, V]` for the rows `[n]`."""


class Conditionals(LatentChain):
    """The part of a [`CoupledCategorical`] that asks for tokens given others."""

    def partial_log_prob(self, value: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, B]` of the tokens at some masked positions, others summed out.

        Several sets of positions cost one recursion over a larger batch.

        Args:
            value: `[B, L]` tokens; used where `known`.
            known: `[*S, B, L]` bool, the positions that count; masked ones.

        Raises:
            ValueError: `Z` is zero for a row, shapes do not fit, or a token is outside the
                vocabulary.
        """
        self._check_possible()
        shape, device = tuple(self.masked.shape), self.masked.device
        value = as_tensor("value", value, int, shape, device)
        known = as_tensor("known", known, device=device)
        known = as_tensor("known", known, bool, (*known.shape[:-2], *shape))
        batch = known.shape[:-2]
        used = known.reshape(-1, *self.masked.shape).any(0)
        value = torch.where(used, value, 0)
        check_tokens("value", value, self.potentials.vocab_size)
        hard = self._hard_evidence(value)
        evidence = torch.where((known & self.masked)[..., None], hard, self._evidence)
        chain = self._chain(evidence.reshape(-1, *hard.shape[1:]))
        joint = chains.forward_filter(chain).log_partition.reshape(*batch, -1)
        token = self._prediction.log_prob_of(value)
        return joint - self.log_partition + torch.where(known, token, 0).sum(-1)

    @torch.no_grad()
    def draw_left_to_right(self, where: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Draws tokens one by one, each given those before it, in one pass for all.

        At every position of `where`, from left to right, `draw` gets the exact law of the token
        given what is observed and what was drawn before; positions outside of `where` are summed
        out.

        Args:
            where: `[B, L]` bool, the positions to draw; masked ones.
            draw: see [`Draw`]. It must draw the same token for a row when it is asked again.

        Returns:
            `[B, L]` tokens; 0 outside of `where`.
        """
        tokens = torch.zeros_like(self.tokens)
        chain = self._chain(self._evidence)
        outside = self._chain(torch.zeros_like(self._evidence)).evidence

        def visit(i: int, around: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            evidence = chain.evidence[rows, i]
            chosen = where[rows, i]
            rows = rows[chosen]
            if len(rows) == 0:
                return evidence
            positions = torch.full_like(rows, i)
            posterior = normalised_exp(around[chosen] + evidence[chosen])
            tokens[rows, i] = draw(i, self.token_laws(rows, positions, posterior), rows)
            drawn = self._hard_evidence_at(rows, positions, tokens[rows, i])
            return evidence.index_put((chosen,), drawn + outside[rows, i])

        sweep(chain, visit)
        return tokens

    @torch.no_grad()
    def leave_one_out(
        self,
        tokens: torch.Tensor,
        known: torch.Tensor,
        soft_evidence: torch.Tensor,
        log_probs: torch.Tensor,
    ) -> torch.Tensor:
        r"""Probability `[B, L]` of each known token given all other known ones, in one pass.

            p(x_i | x_{known \ i})
                = phi_i(x_i) \sum_z around_i(z) E(z, x_i) / \sum_z around_i(z) s_i(z)

        Here `around_i(z)` is what the rest of the chain gives to the latent: the product of the
        messages from both sides. The sum over the vocabulary is the soft evidence `s_i`.

        A backbone predicts what is masked. For tokens that were masked in an earlier pass,
        `soft_evidence` and `log_probs` may be those of that pass.

        Args:
            tokens: `[B, L]`; used where `known`.
            known: `[B, L]` bool.
            soft_evidence: `[B, L, H + J]`, log of `s_i`, as in `soft_evidence` of this or an
                earlier distribution over the window.
            log_probs: `[B, L]`, `log phi_i(x_i)` of the known tokens.
        """
        hard = self._hard_evidence(torch.where(known, tokens, 0))
        chain = self._chain(torch.where(known[..., None], hard, soft_evidence))
        outside = self._chain(torch.zeros_like(hard)).evidence
        # No state gives a token more than it gives to all; copy states may have changed since.
        of_token = torch.minimum(log_probs[..., None] + hard, soft_evidence)
        result = torch.zeros_like(log_probs)

        def visit(i: int, around: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            around = around + outside[rows, i]
            of_all = logsumexp(around + soft_evidence[rows, i], -1)
            of_one = logsumexp(around + of_token[rows, i], -1)
            ratio = (of_one - of_all).exp()
            result[rows, i] = torch.where(of_all == -torch.inf, 0, ratio)
            return chain.evidence[rows, i]

        sweep(chain, visit)
        return result

    @property
    def soft_evidence(self) -> torch.Tensor:
        """`[B, L, H + J]`: log of what the prediction of each masked position gives to the latents.

        At observed positions it is what their token gives to them.
        """
        return self._evidence

    def factorized_log_prob_of(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, L]`: the backbone's log-probabilities of tokens `[B, L]`, at masked positions."""
        value = as_tensor("value", value, int, self.masked.shape, self.masked.device)
        check_tokens("value", torch.where(self.masked, value, 0), self.potentials.vocab_size)
        return self._prediction.log_prob_of(torch.where(self.masked, value, 0))

    def token_laws(
        self, rows: torch.Tensor, positions: torch.Tensor, posterior: torch.Tensor
    ) -> torch.Tensor:
        """Laws `[N, V]` of the tokens at masked positions.

        They are the backbone's own in rows where the circuit is not active or nothing is possible.

        Args:
            rows: `[N]`.
            positions: `[N]`.
            posterior: `[N, H + J]`, the laws of the latents there; zeros where nothing is possible.
        """
        log_phi = self._log_phi[rows, positions]
        weights = self._emission_weights(rows, positions, posterior)
        mixed = mix_tokens(
            self.potentials.emission, log_phi, weights, positions, self.potentials.summary
        )
        number = self.potentials.num_latents
        if self._copies is not None:
            own = posterior[:, :number].sum(-1, keepdim=True)
            tokens = self._copies.tokens[rows]
            mixed = (own * mixed).scatter_add(1, tokens, posterior[:, number:].to(mixed.dtype))
        coupled = self.active[rows] & (posterior > 0).any(-1)
        return mixed if bool(coupled.all()) else torch.where(coupled[:, None], mixed, log_phi.exp())

    def token_probs(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        posterior: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """`[N]`: what `token_laws` give to tokens `[N]`, at no cost in the vocabulary."""
        log_phi = self._prediction[rows, positions].log_prob_of(tokens)
        weights = self._emission_weights(rows, positions, posterior)
        columns = self.potentials.emission.columns(tokens, positions).to(self._dtype)
        mixed = (log_phi + logsumexp(weights + columns, -1)).exp()
        if self._copies is not None:
            emits = self._copies.tokens[rows] == tokens[:, None]
            mixed = mixed + (posterior[:, self.potentials.num_latents :] * emits).sum(-1)
        coupled = self.active[rows] & (posterior > 0).any(-1)
        return torch.where(coupled, mixed, log_phi.exp())

    def _emission_weights(
        self, rows: torch.Tensor, positions: torch.Tensor, posterior: torch.Tensor
    ) -> torch.Tensor:
        """`[N, H]` log of `posterior(z) / s(z)`: what states weigh in the mixture of emissions."""
        number = self.potentials.num_latents
        weights = safe_log(posterior[:, :number])
        evidence = self._evidence[rows, positions, :number]
        return weights - torch.where(weights == -torch.inf, 0, evidence)

    def _hard_evidence_at(
        self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """`[N, H + J]` log-evidence without context of single tokens."""
        evidence = self.potentials.emission.columns(tokens, positions).to(self._dtype)
        if self._copies is not None:
            emits = self._copies.tokens[rows] == tokens[:, None]
            copied = torch.where(emits, self._copies.weight[rows], -torch.inf)
            evidence = torch.cat((evidence, copied), -1)
        return torch.where(self.active[rows, None], evidence, 0)
