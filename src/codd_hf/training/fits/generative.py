"""The fit of a circuit to windows of text, as a generative model.

Predictive states give the start (from a random one EM stalls, from a uniform one it never moves);
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

from ...circuits import Potentials, expected_counts, log_likelihood, maximise
from ...data.canvases import TokenizedExample
from ...data.fingerprint import weights_fingerprint
from ..checkpoints import Checkpoints
from ..loop import Figures, Fit, History, Log, summed
from ..settings import GenerativeConfig
from .predictive_states import initial_potentials

STEP_DECAY = 0.6
"""The share of a batch in the counts is `(step + 2) ** -STEP_DECAY`; of the first one all."""
LEAVES = [f"{part}.{i}" for part in ("potentials", "counts") for i in range(3)]


def text_windows(
    examples: Sequence[TokenizedExample], window_length: int, eos_token_id: int
) -> torch.Tensor:
    """The windows `[N, L]` of all answers, cut as decoding cuts them, filled with end-of-text."""
    answers = (example.answer_ids for example in examples)
    filled = (ids + [eos_token_id] * (-len(ids) % window_length) for ids in answers)
    return torch.tensor(list(itertools.chain(*filled))).view(-1, window_length)


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
        embeddings: `[V, d]` of the backbone's output: which tokens are alike.
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
        unigrams = self.windows.flatten().bincount(minlength=len(self.embeddings)) + 0.1
        smoothed = unigrams / unigrams.sum()
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
        size = self.num_latents
        shapes = [(size,), (1, size, size), (1, size, len(self.embeddings))]
        start = [torch.zeros(shape) for shape in shapes]
        if Accelerator().is_main_process:
            data = (self.windows, self.embeddings, size, self.config.seed)
            start = list(initial_potentials(*data).leaves())
        start = [broadcast(leaf.to(self.device)) for leaf in start]
        leaves = (*start, *map(torch.zeros_like, start))
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
