"""Fits of circuits: expectation-maximisation, and what else is computed of a whole one.

Expected counts are gradients: with `ll = sum log p_w(x)`, the expected number of uses of a
parameter `theta` is `d ll / d log theta` (Darwiche, 2003). One differentiated forward pass of the
chain is therefore a whole E-step.
"""

import torch
from torch.nn import functional as F

from .potentials.circuit import Potentials
from .recursions.chain import Chain

Counts = tuple[torch.Tensor, ...]
"""Expected counts, shaped as the potentials' leaves: initial, transitions, emissions."""


def log_likelihood(potentials: Potentials, tokens: torch.Tensor) -> torch.Tensor:
    """`log p_w(x)`, `[B]`, of tokens `[B, L]`."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    evidence = potentials.emission.columns(tokens, positions)
    chain = Chain(potentials.transition, evidence).started(potentials.initial)
    return chain.filter().log_partition


def expected_counts(potentials: Potentials, tokens: torch.Tensor) -> tuple[Counts, torch.Tensor]:
    """E-step: expected counts summed over the batch, and the log-likelihoods `[B]`."""
    leaves = [leaf.detach().requires_grad_() for leaf in potentials.leaves()]
    with torch.enable_grad():
        scores = log_likelihood(potentials.with_leaves(leaves), tokens)
        # Windows of one token have no transitions: their counts are zero.
        counts = torch.autograd.grad(scores.sum(), leaves, materialize_grads=True)
    return counts, scores.detach()


def maximise(potentials: Potentials, counts: Counts, prior: Counts) -> Potentials:
    """M-step: the normalised circuit with these counts, and pseudo-counts `prior` (broadcast)."""
    pairs = zip(counts, prior, strict=True)
    return potentials.with_leaves(
        [(mine + extra).clamp(min=0).log().log_softmax(-1) for mine, extra in pairs]
    )


def occupancy(potentials: Potentials, length: int) -> torch.Tensor:
    """`[L, H]`: how likely a normalised circuit is to be in each state, no token being known."""
    transition = potentials.transition.log_potential.exp()
    states = [potentials.initial.exp()]
    for i in range(length - 1):
        states.append(states[-1] @ transition[min(i, len(transition) - 1)])
    return torch.stack(states)


def token_marginal(potentials: Potentials, length: int) -> torch.Tensor:
    """Token marginals of a normalised circuit, `[L, V]`; of tied emissions their mean, `[V]`."""
    states, emission = occupancy(potentials, length), potentials.emission.dense()
    if len(emission) == 1:
        return states.mean(0) @ emission[0].exp()
    return torch.einsum("lh,lhv->lv", states, emission.exp())


@torch.no_grad()
def fit_tied(
    log_emission: torch.Tensor, output_embedding: torch.Tensor, weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tied emissions closest to dense ones, by weighted least squares on the logarithms.

    Args:
        log_emission: `[H, V]`.
        output_embedding: `W_out [V, d]`.
        weights: `[V]`, what a token counts (its frequency).
        rank: `r`; no more than `d` or `H` is used, the rest stays zero.

    Returns:
        `U [H, r]`, `P [r, d]` and the bias `b [V]`, the mean over the states.
    """
    target, embedding = log_emission.double(), output_embedding.double()
    bias = target.mean(0)
    weighted = embedding.T * weights.double()
    gram = weighted @ embedding
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    map_ = torch.linalg.solve(gram, weighted @ (target - bias).T).T  # [H, d]
    # The best rank-r map in the metric in which errors are counted.
    root = torch.linalg.cholesky(gram)
    left, scale, right = torch.linalg.svd(map_ @ root, full_matrices=False)
    scale = scale[:rank].sqrt()
    latents, right = left[:, :rank] * scale, scale[:, None] * right[:rank]
    projection = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    missing = rank - len(scale)
    return F.pad(latents, (0, missing)), F.pad(projection, (0, 0, 0, missing)), bias
