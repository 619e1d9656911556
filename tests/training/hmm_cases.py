"""Small HMMs, windows drawn from them, and their counts by enumeration of latent paths."""

from __future__ import annotations

import itertools

import torch

from codd_hf import Potentials
from codd_hf.circuits.em import Counts

NO_PRIOR = (torch.zeros(1),) * 3


def random_hmm(
    latents: int = 2, vocab: int = 3, sharpness: float = 1.0, seed: int = 0, tied: bool = True
) -> Potentials:
    generator = torch.Generator().manual_seed(seed)
    steps, positions = (1, 1) if tied else (3, 4)
    shapes = ((latents,), (steps, latents, latents), (positions, latents, vocab))
    return Potentials(
        *((sharpness * torch.randn(s, generator=generator)).log_softmax(-1) for s in shapes)
    )


def sample_windows(hmm: Potentials, number: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def draw(log_probs: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]

    state = draw(hmm.initial.expand(number, -1))
    _, transition, emission = hmm.tensors()
    tokens = [draw(emission[0][state])]
    for _ in range(length - 1):
        state = draw(transition[0][state])
        tokens.append(draw(emission[0][state]))
    return torch.stack(tokens, 1)


def counts_by_enumeration(hmm: Potentials, windows: torch.Tensor) -> tuple[Counts, torch.Tensor]:
    """Expected uses of every parameter, and log-likelihoods, summed over all latent paths."""
    initial, transition, emission = (tensor.double() for tensor in hmm.tensors())
    counts = tuple(torch.zeros_like(t) for t in (initial, transition, emission))
    scores = []
    for tokens in windows.tolist():
        paths = list(itertools.product(range(hmm.num_latents), repeat=len(tokens)))
        used = []
        for path in paths:
            steps = [
                (min(i, len(transition) - 1), *p) for i, p in enumerate(itertools.pairwise(path))
            ]
            draws = [
                (min(i, len(emission) - 1), z, v)
                for i, (z, v) in enumerate(zip(path, tokens, strict=True))
            ]
            used.append((path[0], steps, draws))
        log_weights = torch.stack(
            [
                initial[first] + sum(transition[s] for s in steps) + sum(emission[d] for d in draws)
                for first, steps, draws in used
            ]
        )
        scores.append(log_weights.logsumexp(0))
        for weight, (first, steps, draws) in zip(log_weights.softmax(0), used, strict=True):
            counts[0][first] += weight
            for step in steps:
                counts[1][step] += weight
            for draw in draws:
                counts[2][draw] += weight
    return counts, torch.stack(scores)
