"""The fit of a circuit to windows of text, as a generative model.

Clusters of tokens give the start (from a random one EM stalls, from a uniform one it never moves);
stepwise EM (Liang and Klein, 2009) does the rest: a running average of the counts, in which a new
batch has a share that falls from step to step.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from sklearn.cluster import KMeans, MiniBatchKMeans

from ...circuits import Potentials, expected_counts, log_likelihood, maximise
from ...data.canvases import TokenizedExample
from ...data.fingerprint import weights_fingerprint
from ..checkpoints import Checkpoints
from ..loop import Figures, Fit, History, Log, summed
from ..settings import GenerativeConfig

STEP_DECAY = 0.6
"""The share of a batch in the counts is `(step + 2) ** -STEP_DECAY`; of the first one all."""
CONCENTRATION, NOISE = 0.9, 0.1
"""The share of a state's initial emissions that goes to its cluster, and the log-scale of the noise
on the initial parameters."""
LEAVES = [f"{part}.{i}" for part in ("potentials", "counts") for i in range(3)]


def text_windows(
    examples: Sequence[TokenizedExample], window_length: int, eos_token_id: int
) -> torch.Tensor:
    """The windows `[N, L]` of all answers, cut as decoding cuts them, filled with end-of-text."""
    answers = (example.answer_ids for example in examples)
    filled = (ids + [eos_token_id] * (-len(ids) % window_length) for ids in answers)
    return torch.tensor(list(itertools.chain(*filled))).view(-1, window_length)


def cluster_tokens(
    embeddings: torch.Tensor, counts: torch.Tensor, num_clusters: int, seed: int = 0
) -> torch.Tensor:
    """The cluster `[V]` of each token: k-means of embeddings `[V, d]`, weighted by counts `[V]`.

    There are no more clusters than tokens that were seen.
    """
    features = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    weights = counts.float().cpu().numpy()
    seen = weights > 0
    num_clusters = min(num_clusters, int(seen.sum()))
    estimator = KMeans if len(features) <= 20_000 else MiniBatchKMeans
    kmeans = estimator(num_clusters, n_init=1, max_iter=30, random_state=seed)
    kmeans.fit(features[seen], sample_weight=weights[seen])
    return torch.from_numpy(kmeans.predict(features)).long()


def initial_potentials(
    windows: torch.Tensor, clusters: torch.Tensor, num_latents: int, seed: int = 0
) -> Potentials:
    """A circuit whose states are clusters of tokens and whose transitions are cluster bigrams.

    Where there are more states than tokens, copies of a token's differ in the token before.
    """
    vocab_size = len(clusters)
    generator = torch.Generator().manual_seed(seed)
    counts = windows.flatten().bincount(minlength=vocab_size)
    used = min(num_latents, int((counts > 0).sum()))
    smoothed = counts.float() + 0.1

    of_cluster = torch.zeros(used, vocab_size)
    of_cluster[clusters, torch.arange(vocab_size)] = smoothed
    of_cluster = of_cluster / of_cluster.sum(-1, keepdim=True).clamp(min=1e-9)
    emission = CONCENTRATION * of_cluster + (1 - CONCENTRATION) * (smoothed / smoothed.sum())

    own = clusters[windows]
    before = torch.cat((own[:, :1], own[:, :-1]), 1)
    states = own + used * (before % ((num_latents - 1 - own) // used + 1))
    pairs = states[:, :-1] * num_latents + states[:, 1:]
    bigrams = pairs.flatten().bincount(minlength=num_latents**2).view(num_latents, num_latents)
    starts = states[:, 0].bincount(minlength=num_latents).float() + 0.1
    occupancy = states.flatten().bincount(minlength=num_latents).float() + 0.1
    transition = bigrams + occupancy / occupancy.sum()

    def noisy(weights: torch.Tensor) -> Any:
        noise = NOISE * torch.randn(weights.shape, generator=generator)
        return (weights.log() + noise).log_softmax(-1)

    emission = emission[torch.arange(num_latents) % used]
    return Potentials(noisy(starts), noisy(transition)[None], noisy(emission)[None])


def fit_generative(
    windows: torch.Tensor,
    validation: torch.Tensor,
    embeddings: torch.Tensor,
    num_latents: int,
    config: GenerativeConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> tuple[Potentials, History]:
    """Fits a circuit to windows of tokens.

    Args:
        windows: `[N, L]`, at least 2 tokens each.
        validation: `[M, L]`.
        embeddings: `[V, d]` of the backbone's output, for the clustering.
        num_latents: number of states `H`.
        config: how to fit.
        checkpoints: where the fit is kept, and goes on from.
        log: told of every step.

    Returns:
        The circuit, and the history: each epoch's `nats` per token of the validation windows.
    """
    config = config or GenerativeConfig()
    fit = _Maximisation(windows, validation, embeddings, num_latents, config)
    history = fit.run(checkpoints, log)
    return fit.potentials.with_leaves([leaf.cpu() for leaf in fit.potentials.leaves()]), history


@dataclass
class _Maximisation(Fit):
    """Steps of EM; counts of chunks are summed in float64 over all processes."""

    windows: torch.Tensor
    validation: torch.Tensor
    embeddings: torch.Tensor
    num_latents: int
    config: GenerativeConfig
    name = "generative fit"
    remedy = "raise `emission_prior` or `transition_prior`"

    def __post_init__(self) -> None:
        config, self.device = self.config, Accelerator().device
        self.unigrams = self.windows.flatten().bincount(minlength=len(self.embeddings)).float()
        smoothed = (self.unigrams + 0.1) / (self.unigrams + 0.1).sum()
        transitions = torch.full((self.num_latents,), config.transition_prior / self.num_latents)
        pseudo = (torch.ones(1), transitions, config.emission_prior * smoothed)
        self.prior = tuple(counts.to(self.device) for counts in pseudo)
        self.evaluation_steps = -(-len(self.windows) // config.windows_per_batch)
        self.num_steps = config.num_epochs * self.evaluation_steps
        data = {
            "data": self.windows,
            "validation_data": self.validation,
            "embeddings": self.embeddings,
        }
        digests = {name: weights_fingerprint({name: tensor}) for name, tensor in data.items()}
        self.identity = config.identity() | {"num_latents": self.num_latents} | digests

    def begin(self) -> None:
        clusters = torch.zeros(len(self.embeddings), dtype=torch.long)
        if Accelerator().is_main_process:
            features = (self.embeddings, self.unigrams)
            clusters = cluster_tokens(*features, self.num_latents, self.config.seed)
        clusters = broadcast(clusters.to(self.device)).cpu()
        start = initial_potentials(self.windows, clusters, self.num_latents, self.config.seed)
        leaves = (*start.leaves(), *map(torch.zeros_like, start.leaves()))
        self.restore(dict(zip(LEAVES, leaves, strict=True)))

    def state(self) -> dict[str, torch.Tensor]:
        return dict(zip(LEAVES, (*self.potentials.leaves(), *self.counts), strict=True))

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        leaves: list[Any] = [tensors[name].to(self.device) for name in LEAVES]
        self.potentials, self.counts = Potentials(*leaves[:3]), tuple(leaves[3:])

    def step(self, number: int) -> tuple[Figures, int]:
        epoch, batch = divmod(number, self.evaluation_steps)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        windows = self.windows[order.split(self.config.windows_per_batch)[batch]]

        def values(_: int, chunk: torch.Tensor) -> list[torch.Tensor]:
            counts, scores = expected_counts(self.potentials, chunk.to(self.device))
            return [*counts, scores.double().sum()]

        leaves = self.potentials.leaves()
        shapes = [*(leaf.shape for leaf in leaves), torch.Size()]
        chunks = windows.split(self.config.windows_per_chunk)
        *sums, score = summed(shapes, chunks, values)
        share = (number + 2) ** -STEP_DECAY if number else 1.0
        figures = {"loss": -score.item() / windows.numel(), "step_size": share}
        self.check_finite(figures, f"step {number}")
        weight, mixed = len(self.windows) / len(windows), []
        for mine, new in zip(self.counts, sums, strict=True):
            mixed.append(torch.lerp(mine, new.to(mine.dtype) * weight, share))
        self.counts = tuple(mixed)
        self.potentials = maximise(self.potentials, self.counts, self.prior)
        return figures, windows.numel()

    @torch.no_grad()
    def measure(self) -> Figures:
        def values(_: int, windows: torch.Tensor) -> list[torch.Tensor]:
            return [log_likelihood(self.potentials, windows.to(self.device)).double().sum()]

        chunks = self.validation.split(self.config.windows_per_chunk)
        (total,) = summed([torch.Size()], chunks, values)
        return {"nats": -total.item() / self.validation.numel()}
