"""Hidden states to start a circuit's fit from: what the past of a window tells of its future.

What a circuit must remember of a window's past is what its future goes with: the directions of
their canonical correlations (Dhillon, Rodu, Foster and Ungar, "Two Step CCA", 2012). What it must
tell of a position's token is what goes with the past. Positions that are near one another in both
share a state.
"""

from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans

from ...circuits import Potentials, log_likelihood

DECAYS = (0.5, 0.8, 0.95)
"""How a token's weight in the past falls with each position that follows it."""
NUM_FEATURES, NUM_DIRECTIONS = 256, 48
"""Of a token, and of either kind of direction, at most."""
NUM_POSITIONS = 100_000
"""The positions that directions and clusters are found on, and that are held at a time."""
RIDGE = 1e-3
CONCENTRATION, NOISE = 0.9, 0.1
"""The share of a state's initial emissions that is its own, and the log-scale of the noise on the
initial parameters."""


def token_features(embeddings: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Features `[V, min(d, 256)]` of tokens: embeddings `[V, d]`, normalised and projected."""
    features = torch.nn.functional.normalize(embeddings.float().cpu(), dim=-1)
    width = features.shape[-1]
    if width <= NUM_FEATURES:
        return features
    return features @ torch.randn(width, NUM_FEATURES, generator=generator) / NUM_FEATURES**0.5


def pasts(windows: torch.Tensor, tokens: torch.Tensor, means: bool) -> torch.Tensor:
    """Features `[N, L, (1 + len(DECAYS)) * d]` of each position of windows `[N, L]`.

    They are those of its token (of `tokens`, `[V, d]`) and the decaying sums of those before it, or
    their means, which do not tell how many these are.
    """
    now = tokens[windows]
    sums = [torch.zeros_like(now) for _ in DECAYS]
    for decay, before in zip(DECAYS, sums, strict=True):
        for position in range(1, windows.shape[1]):
            before[:, position] = decay * before[:, position - 1] + now[:, position - 1]
        if means:
            before[:, 1:] /= (decay ** torch.arange(windows.shape[1] - 1)).cumsum(0)[:, None]
    return torch.cat((now, *sums), -1)


def whitening(features: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix that makes centred features `[N, d]` uncorrelated, of variance one."""
    covariance = features.T @ features / len(features)
    ridge = RIDGE * covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * (values.clamp(min=0) + ridge).rsqrt()) @ vectors.T


def canonical(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The projection `[d, k]` of features `[N, d]` to what others `[N, e]` go with.

    The standard deviation of each direction is its correlation.
    """
    features, others = features - features.mean(0), others - others.mean(0)
    whiten = whitening(features)
    correlation = whiten @ (features.T @ others / len(features)) @ whitening(others)
    directions, strengths, _ = torch.linalg.svd(correlation, full_matrices=False)
    return (whiten @ directions * strengths)[:, :NUM_DIRECTIONS]


def predictive_states(
    windows: torch.Tensor,
    embeddings: torch.Tensor,
    num_latents: int,
    seed: int = 0,
    means: bool = False,
) -> torch.Tensor:
    """The state `[N, L]`, below `num_latents`, of each position of windows `[N, L]`, `L >= 2`.

    Args:
        windows: tokens.
        embeddings: `[V, d]`, alike for tokens that are used alike.
        num_latents: the number of states.
        seed: of the sample of windows, the projection and the clusters.
        means: the past is told by means of its tokens, not by sums.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = token_features(embeddings, generator)
    width = tokens.shape[1]
    at_a_time = -(-NUM_POSITIONS // windows.shape[1])
    sample = windows[torch.randperm(len(windows), generator=generator)[:at_a_time]]
    past = pasts(sample, tokens, means)
    now, before = past[:, 1:, :width].flatten(0, 1), past[:, 1:, width:].flatten(0, 1)
    future = pasts(sample.flip(1), tokens, means).flip(1)[:, 1:].flatten(0, 1)
    past = past[:, :-1].flatten(0, 1)
    own = torch.nn.functional.pad(canonical(now, before), (0, 0, 0, past.shape[-1] - width))
    project = torch.cat((canonical(past, future), own), 1)

    points = (past @ project).numpy()
    number = min(num_latents, len(points))
    clusters = MiniBatchKMeans(number, n_init=1, max_iter=50, batch_size=8192, random_state=seed)
    clusters.fit(points)
    states = []
    for chunk in windows.split(at_a_time):
        points = (pasts(chunk, tokens, means) @ project).flatten(0, 1).numpy()
        states.append(torch.from_numpy(clusters.predict(points)).long().view(chunk.shape))
    return torch.cat(states)


def circuit_of_states(
    windows: torch.Tensor, states: torch.Tensor, vocab_size: int, num_latents: int, seed: int = 0
) -> Potentials:
    """The likeliest circuit of windows `[N, L]` whose states `[N, L]` are known, smoothed."""
    generator = torch.Generator().manual_seed(seed)

    def pairs(first: torch.Tensor, second: torch.Tensor, size: int) -> torch.Tensor:
        number = (first * size + second).flatten().bincount(minlength=num_latents * size)
        return number.view(num_latents, size).float()

    def noisy(weights: torch.Tensor) -> Any:
        noise = NOISE * torch.randn(weights.shape, generator=generator)
        return (weights.log() + noise).log_softmax(-1)

    unigrams = windows.flatten().bincount(minlength=vocab_size) + 0.1
    emissions = pairs(states, windows, vocab_size)
    emission = CONCENTRATION * emissions / emissions.sum(-1, keepdim=True).clamp(min=1)
    emission = emission + (1 - CONCENTRATION) * unigrams / unigrams.sum()
    occupancy = states.flatten().bincount(minlength=num_latents) + 0.1
    transition = pairs(states[:, :-1], states[:, 1:], num_latents) + occupancy / occupancy.sum()
    start = states[:, 0].bincount(minlength=num_latents) + 0.1
    return Potentials(noisy(start), noisy(transition)[None], noisy(emission)[None])


def initial_potentials(
    windows: torch.Tensor, embeddings: torch.Tensor, num_latents: int, seed: int = 0
) -> Potentials:
    """The start for windows `[N, L]`: of states by sums and states by means, the likelier circuit.

    How far a window has come tells much of some texts and nothing of others.
    """
    starts = []
    for means in (False, True):
        states = predictive_states(windows, embeddings, num_latents, seed, means)
        starts.append(circuit_of_states(windows, states, len(embeddings), num_latents, seed))
    return max(starts, key=lambda start: log_likelihood(start, windows[:1000]).mean().item())
