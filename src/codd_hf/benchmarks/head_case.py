"""A head step to measure: a random head and window, the step, and its physical limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..circuits.reference import plain_step
from ..configuration_codd import CoDDHeadConfig
from ..modeling_head import DEFAULT_EVIDENCE_SIZE, CoDDHead
from .report import Options
from .timing import LINE, Rates

ENTROPY = 3.0
"""Nats of a prediction on average: the backbone is neither sure nor lost."""

SHARED = 0.68
"""Share of the variance of logits that all predictions have in common."""

NEW = 32 << 20
"""Bytes above which a result takes new memory; less is kept for the next use, as by glibc."""

LISTS = {"listed": DEFAULT_EVIDENCE_SIZE, "short list": 16}
"""Tokens of a prediction that a step reads."""

EVIDENCE = ("exact", *LISTS)


@dataclass(frozen=True)
class Shape:
    """Sizes of a head step: `batch` windows of `window` positions, all of them masked."""

    vocab: int = 126_464
    latents: int = 1024
    window: int = 32
    batch: int = 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "window": self.window,
            "states H": self.latents,
            "vocabulary V": self.vocab,
        }


LLADA_8B = Shape()
QUICK = Shape(vocab=512, latents=32, window=8)


class HeadCase:
    """A head with random normalised potentials, and the inputs of a step.

    Predictions share a part of their logits, as the frequencies of tokens are shared: of the lists
    of `DEFAULT_EVIDENCE_SIZE` tokens of a window 51 % are distinct, of those of eight windows 18 %;
    a language model has 39 and 18 % (SmolLM2-135M, `examples/listed_tokens.py`).

    Args:
        shape: sizes of the step.
        options: device and seed.
        head: of another case of the same sizes, to be used again.
    """

    def __init__(self, shape: Shape, options: Options, head: CoDDHead | None = None) -> None:
        self.shape = shape
        self.head = head or random_head(shape, options)
        self.frozen = self.head.frozen()
        generator = torch.Generator(options.device).manual_seed(options.seed + 1)
        size = (shape.batch, shape.window, shape.vocab)
        logits = torch.randn(size, generator=generator, device=options.device)
        shared = torch.randn(size[-1], generator=generator, device=options.device)
        logits.mul_((1 - SHARED) ** 0.5).add_(shared, alpha=SHARED**0.5)
        logits[..., -1] = -torch.inf
        low, high = 0.0, 20.0
        for _ in range(12):
            middle = (low + high) / 2
            sure = mean_entropy(middle * logits[0]) < ENTROPY
            low, high = (low, middle) if sure else (middle, high)
        self.logits = logits.mul_(high)
        self.tokens = torch.full(size[:2], shape.vocab - 1, device=options.device)
        self.observed = torch.zeros_like(self.tokens, dtype=torch.bool)

    @torch.no_grad()
    def step(self, evidence: str = "exact", marginals: bool = False) -> torch.Tensor:
        """What a head adds to a denoising step: evidence, filter, latents, coupled log-probs.

        Args:
            evidence: one of `EVIDENCE`; decoding takes `listed` for a large vocabulary.
            marginals: whether to compute the candidates' exact marginals too, by which decoding
                ranks positions.

        Returns:
            `[B, L, V]` log-probabilities given the sampled latents.
        """
        distribution = self.frozen(
            self.logits,
            tokens=self.tokens,
            observed=self.observed,
            top_k=self._listed(evidence),
        )
        coupled = distribution.logits_given(distribution.sample_latents())
        if marginals:
            distribution.marginal_probs_of(coupled.argmax(-1))
        return coupled

    def plain_step(self) -> object:
        """The same as the paper states it."""
        circuit = (self.head.initial, self.head.transition, self.head.emission)
        return plain_step(circuit, self.logits, self.tokens, self.observed)

    def num_listed(self, evidence: str) -> int:
        """How many tokens are in the list of any prediction."""
        k = self._listed(evidence) or self.shape.vocab
        return len(self.logits.topk(k, -1, sorted=False).indices.unique())

    def _listed(self, evidence: str) -> int:
        return min(LISTS.get(evidence, 0), self.shape.vocab)

    def limit(self, rates: Rates, evidence: str = "exact") -> float:
        """Least seconds of a step on this machine: the sum of four parts that wait for each other.

        The logits are read. The evidence takes a product with all emissions or, with lists, a cache
        line for every number that it gathers (or all of them, if that is faster) and a product with
        the means of the groups. The chain multiplies with the transitions, read from memory once
        and from a cache then. The emissions of its latents are read, and the coupled
        log-probabilities written.
        """
        shape, limit = self.shape, rates.limit
        positions, square = shape.batch * shape.window, shape.latents**2
        emissions, result = 4 * shape.latents * shape.vocab, 4 * positions * shape.vocab
        reading = limit(positions * emissions / 2, copy=emissions)
        if evidence != "exact":
            gathered = limit(scattered=LINE * self.num_listed(evidence) * shape.latents)
            reading = min(gathered, limit(copy=emissions))
            reading += limit(2 * positions * square, copy=4 * square + 8 * shape.vocab)
        again = 4 * max(shape.window - 2, 0) * square
        chain = limit(2 * positions * square, copy=4 * square, cached=again)
        new = result if result > NEW else 0
        return limit(copy=result) + reading + chain + limit(copy=2 * result - new, new=new)


def random_head(shape: Shape, options: Options) -> CoDDHead:
    """A head with random normalised potentials; the last token is the mask token."""
    config = CoDDHeadConfig(
        vocab_size=shape.vocab,
        num_latents=shape.latents,
        window_length=shape.window,
        mask_token_id=shape.vocab - 1,
    )
    head = CoDDHead(config).to(options.device).eval()
    generator = torch.Generator(options.device).manual_seed(options.seed)
    with torch.no_grad():
        for parameter in (head.initial, head.transition, head.emission):
            parameter.normal_(0.0, 2.0, generator=generator)
            parameter.sub_(parameter.logsumexp(-1, keepdim=True))
        head.token_marginal.fill_(1 / shape.vocab)
    return head


def mean_entropy(logits: torch.Tensor) -> float:
    """Nats of a prediction, averaged over positions."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1).mean().item()
