"""Stage 1: fit a circuit to windows of text, as a generative model.

Clusters of tokens give the start (from a random one EM stalls, from a uniform one it never moves);
minibatch EM with running averages of the counts does the rest (stepwise EM: Liang and Klein, 2009).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from tqdm.auto import tqdm

from ..circuits import DenseTransition, MonarchTransition, Potentials
from ..circuits.em import Counts, expected_counts, log_likelihood, maximise
from .checkpoint import load_checkpoint, save_checkpoint
from .data import TokenizedExample, collate
from .settings import GenerativeConfig

logger = logging.getLogger(__name__)

STRUCTURES = {"dense": DenseTransition, "monarch": MonarchTransition}


def text_windows(
    examples: Sequence[TokenizedExample], window_length: int, eos_token_id: int
) -> torch.Tensor:
    """The windows `[N, L]` of all answers, cut as decoding cuts them, filled with end-of-text."""
    windows = []
    for example in examples:
        canvas = collate(
            [TokenizedExample([], example.answer_ids)],
            window_length=window_length,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
        windows.append(canvas.input_ids.view(-1, window_length))
    return torch.cat(windows)


def cluster_tokens(
    embeddings: torch.Tensor, counts: torch.Tensor, num_clusters: int, seed: int = 0
) -> torch.Tensor:
    """k-means of token embeddings, weighted by frequency.

    Args:
        embeddings: `[V, d]`, the backbone's output embeddings.
        counts: `[V]`, how often each token occurs.
        num_clusters: number of clusters; no more than there are tokens that occur.
        seed: seed of the clustering.

    Returns:
        `[V]` cluster of each token.
    """
    features = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    weights = counts.float().cpu().numpy()
    seen = weights > 0
    if num_clusters > seen.sum():
        raise ValueError(
            f"`num_latents` ({num_clusters}) exceeds the {int(seen.sum())} different tokens of the "
            "training text: use fewer latents or more text."
        )
    estimator = KMeans if len(features) <= 20_000 else MiniBatchKMeans
    kmeans = estimator(num_clusters, n_init=1, max_iter=30, random_state=seed)
    kmeans.fit(features[seen], sample_weight=weights[seen])
    return torch.from_numpy(kmeans.predict(features)).long()


def initial_potentials(
    windows: torch.Tensor,
    clusters: torch.Tensor,
    num_latents: int,
    config: GenerativeConfig,
    structure: str = "dense",
) -> Potentials:
    """A circuit whose states are clusters of tokens and whose transitions are cluster bigrams."""
    vocab_size = len(clusters)
    generator = torch.Generator().manual_seed(config.seed)
    unigrams = windows.flatten().bincount(minlength=vocab_size).float()
    smoothed = unigrams + 0.1

    own = torch.zeros(num_latents, vocab_size)
    own[clusters, torch.arange(vocab_size)] = smoothed
    own = own / own.sum(-1, keepdim=True).clamp(min=1e-9)
    shared = smoothed / smoothed.sum()
    emission = config.concentration * own + (1 - config.concentration) * shared

    states = clusters[windows]
    pairs = states[:, :-1] * num_latents + states[:, 1:]
    bigrams = pairs.flatten().bincount(minlength=num_latents**2).view(num_latents, num_latents)
    starts = states[:, 0].bincount(minlength=num_latents).float() + 0.1
    occupancy = states.flatten().bincount(minlength=num_latents).float() + 0.1
    transition = bigrams + occupancy / occupancy.sum()

    def noisy(weights: torch.Tensor) -> torch.Tensor:
        noise = config.noise * torch.randn(weights.shape, generator=generator)
        return (weights.log() + noise).log_softmax(-1)

    steps = DenseTransition(noisy(transition)[None])
    if structure == "monarch":
        steps = MonarchTransition.from_dense(steps.log_potential)
    return Potentials(noisy(starts), steps, noisy(emission)[None])


def fit_generative(
    windows: torch.Tensor,
    validation: torch.Tensor,
    embeddings: torch.Tensor,
    num_latents: int,
    config: GenerativeConfig | None = None,
    checkpoint_dir: str | Path | None = None,
    structure: str = "dense",
) -> tuple[Potentials, list[dict[str, float]]]:
    """Fits a circuit with shared transitions and emissions to windows of tokens.

    Args:
        windows: `[N, L]` tokens.
        validation: `[M, L]` tokens.
        embeddings: `[V, d]`, for the clustering.
        num_latents: number of states `H`.
        config: how to fit.
        checkpoint_dir: a run that stopped is continued from `checkpoint_dir/generative`.
        structure: of the transitions, `"dense"` or `"monarch"`.

    Returns:
        The circuit, and per epoch the log-likelihood per token of training and validation windows.
    """
    config = config or GenerativeConfig()
    vocab_size = len(embeddings)
    unigrams = windows.flatten().bincount(minlength=vocab_size).float()
    spread = (unigrams + 0.1) / (unigrams + 0.1).sum()
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / "generative"
    found = None if path is None else load_checkpoint(path)
    potentials = None
    if found is None:
        clusters = cluster_tokens(embeddings, unigrams, num_latents, config.seed)
        potentials = initial_potentials(windows, clusters, num_latents, config, structure)
        counts, step, history = None, 0, []
    else:
        tensors, state = found
        potentials = Potentials(
            tensors["potentials.0"],
            STRUCTURES[structure](
                *(tensors[f"potentials.{i}"] for i in range(1, state["num_leaves"] - 1))
            ),
            tensors[f"potentials.{state['num_leaves'] - 1}"],
        )
        counts = Counts(tuple(tensors[f"counts.{i}"] for i in range(state["num_leaves"])))
        step, history = state["step"], state["history"]
    pseudo = [torch.ones(1)]
    pseudo += [
        torch.full((leaf.shape[-1],), config.transition_prior / leaf.shape[-1])
        for leaf in potentials.transition.tensors()
    ]
    prior = Counts((*pseudo, config.emission_prior * spread))

    for epoch in range(len(history), config.num_epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        batches = torch.randperm(len(windows), generator=generator).split(config.windows_per_batch)
        total, tokens = 0.0, 0
        progress = tqdm(batches, desc=f"EM epoch {epoch + 1}/{config.num_epochs}", unit="batch")
        for batch in progress:
            new, scores = expected_counts(potentials, windows[batch])
            new = new.scaled(len(windows) / len(batch))
            share = (step + 2) ** -config.step_decay
            counts = new if counts is None else counts.mixed_with(new, share)
            potentials = maximise(potentials, counts, prior)
            step += 1
            total, tokens = total + scores.sum().item(), tokens + windows[batch].numel()
            progress.set_postfix(nats=f"{-total / tokens:.3f}")
        with torch.no_grad():
            scores = [log_likelihood(potentials, part) for part in validation.split(512)]
        heldout = torch.cat(scores).sum().item() / validation.numel()
        history.append({"epoch": epoch + 1, "train": total / tokens, "validation": heldout})
        tqdm.write(str(history[-1]))
        if path is not None:
            leaves = potentials.leaves()
            tensors = {f"potentials.{i}": leaf for i, leaf in enumerate(leaves)}
            tensors |= {f"counts.{i}": leaf for i, leaf in enumerate(counts.leaves)}
            state = {"step": step, "history": history, "config": asdict(config)}
            state["num_leaves"] = len(leaves)
            save_checkpoint(path, tensors, state)
    return potentials, history
