"""How much the tokens of a coupled distribution depend on each other."""

import torch

from ...checks.arguments import as_tensor
from ..random import Generators
from .coupled import CoupledCategorical


@torch.no_grad()
def shared_information(
    distribution: CoupledCategorical,
    ranks: torch.Tensor,
    num_samples: int,
    generator: Generators = None,
) -> torch.Tensor:
    r"""How much tokens tell of those that rank before them in their window, in nats, `[B, L]`.

    That is the mutual information `I(x_i; x_{j : rank_j < rank_i})`, zero at observed and absent
    positions. Summed over a set that no other ranks before, it is the dependence of the set: the
    sum of the tokens' entropies minus their joint entropy.

    The entropy of tokens whose latents are summed out has no closed form. This is a mean over joint
    samples of their exact log-probabilities: without bias, though it can come out below zero, and
    to rounding zero where nothing depends on anything. A sample costs `L` recursions.

    Args:
        distribution: over windows `[B, L]`.
        ranks: `[B, L]`, different numbers in a row.
        num_samples: how many joint samples.
        generator: draws them.
    """
    tokens, masked = distribution.tokens, distribution.masked
    ranks = as_tensor("ranks", ranks, int, tokens.shape, tokens.device)
    place = ranks.argsort(1).argsort(1)  # 0 for the first
    known = place <= torch.arange(tokens.shape[1], device=tokens.device)[:, None, None]
    parts = []
    for _ in range(num_samples):
        drawn = distribution.sample((), generator)
        together = distribution.partial_log_prob(drawn, known & masked).T  # of one, two, ...
        gained = together.diff(dim=1, prepend=torch.zeros_like(together[:, :1])).gather(1, place)
        alone = distribution.marginal_probs_of(drawn).log()
        parts.append(gained - alone.masked_fill(~masked, 0))
    return torch.stack(parts).mean(0)
