"""Measure 6: a head step against a plain reading of the paper, and what a head step is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .. import circuits
from ..circuits.reference import plain_step
from ..configuration_codd import CoDDHeadConfig
from ..modeling_head import DEFAULT_TOP_K, CoDDHead
from .report import Options, Report
from .timing import LINE, RateProbes, Rates, median_seconds

ENTROPY = 3.0
"""Nats of a prediction on average: the backbone is neither sure nor lost."""

SHARED = 0.68
"""Share of the variance of logits that all predictions have in common."""

KEPT = 32 << 20
"""Bytes up to which memory that was given back is kept for the next use, as by glibc."""


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


@dataclass
class Window:
    """Inputs of a head step: logits `[B, L, V]`, tokens, observed and hidden states."""

    logits: torch.Tensor
    tokens: torch.Tensor
    observed: torch.Tensor
    hidden: torch.Tensor | None = None

    def num_listed(self, evidence: str) -> int:
        """How many tokens are in the list of any prediction."""
        if evidence == "exact":
            return self.logits.shape[-1]
        k = min(LISTED[evidence], self.logits.shape[-1])
        return len(self.logits.topk(k, -1, sorted=False).indices.unique())


def random_head(shape: Shape, options: Options) -> CoDDHead:
    """A head with normalised random potentials; the last token is the mask token."""
    config = CoDDHeadConfig(
        vocab_size=shape.vocab,
        num_latents=shape.latents,
        window_length=shape.window,
        mask_token_id=shape.vocab - 1,
    )
    with torch.device("meta"):
        head = CoDDHead(config)
    head = head.to_empty(device=options.device).eval()
    generator = torch.Generator(options.device).manual_seed(options.seed)
    with torch.no_grad():
        for parameter in (head.initial, head.transition, head.emission):
            parameter.normal_(0.0, 2.0, generator=generator)
            for row in parameter if parameter.ndim == 2 else [parameter]:
                row.sub_(row.logsumexp(-1))
        head.token_marginal.fill_(1 / shape.vocab)
    return head


def random_window(shape: Shape, options: Options) -> Window:
    """Normal logits, scaled so that a prediction has about `ENTROPY` nats; all masked.

    A part of them, `SHARED` of the variance, is the same for all predictions, as the frequencies of
    tokens are. Of the lists of `DEFAULT_TOP_K` tokens of a window 51 % are then distinct ones, of
    those of eight windows 18 %; a language model has 39 and 18 % (SmolLM2-135M on the held-out
    problems, `examples/listed_tokens.py`).
    """
    generator = torch.Generator(options.device).manual_seed(options.seed + 1)
    size = (shape.batch, shape.window, shape.vocab)
    logits = torch.randn(size, generator=generator, device=options.device)
    shared = torch.randn(size[-1], generator=generator, device=options.device)
    logits.mul_((1 - SHARED) ** 0.5).add_(shared, alpha=SHARED**0.5)
    logits[..., -1] = -torch.inf
    logits *= _scale_to_entropy(logits[0])
    tokens = torch.full(size[:2], shape.vocab - 1, device=options.device)
    return Window(logits, tokens, torch.zeros_like(tokens, dtype=torch.bool))


def _scale_to_entropy(logits: torch.Tensor) -> float:
    """The factor at which predictions `[L, V]` have `ENTROPY` nats on average, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(middle * logits) > ENTROPY else (low, middle)
    return high


def mean_entropy(logits: torch.Tensor) -> float:
    """Nats of a prediction, averaged over positions."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1).mean().item()


EVIDENCE = ("exact", "topk", "grouped")
"""All tokens; lists of them; shorter lists, the rest spread by groups (`evidence_groups`)."""

LISTED = {"topk": DEFAULT_TOP_K, "grouped": 16}
"""Tokens of a list."""


@torch.no_grad()
def head_step(
    head: CoDDHead,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    observed: torch.Tensor,
    hidden: torch.Tensor | None = None,
    evidence: str = "exact",
    confidence: str = "latent",
) -> torch.Tensor:
    """What the head adds to a denoising step: evidence, filter, latents, coupled log-probabilities.

    Args:
        head: the circuit.
        logits: `[B, L, V]`, the backbone's.
        tokens: `[B, L]`, used where `observed`.
        observed: `[B, L]` bool.
        hidden: `[B, L, d]`, for a conditioned head.
        evidence: one of `EVIDENCE`; a model's decoding takes `topk` for a large vocabulary, unless
            its config says otherwise.
        confidence: `marginal` also computes the exact marginals of the candidates, which rank
            positions.

    Returns:
        `[B, L, V]` log-probabilities given the sampled latents.
    """
    if evidence in LISTED:
        how = {"k": min(LISTED[evidence], logits.shape[-1]), "forbidden": head.forbidden}
        if evidence == "grouped":
            groups = head.potentials.token_groups
            logits = circuits.GroupedEvidence.from_logits(logits, groups=groups, **how)
        else:
            logits = circuits.TopKEvidence.from_logits(logits, **how)
    distribution = head(logits, tokens=tokens, observed=observed, last_hidden_state=hidden)
    if bool(distribution.log_partition.isneginf().any()):
        distribution = distribution.with_active(~distribution.log_partition.isneginf())
    coupled = distribution.logits_given(distribution.sample_latents())
    if confidence == "marginal":
        _ = distribution.marginal_probs_of(coupled.argmax(-1))
    return coupled


def head_step_limit(shape: Shape, rates: Rates, num_listed: int, evidence: str = "exact") -> float:
    """Least seconds of a head step on this machine, with `num_listed` tokens in all the lists.

    Four parts wait for each other, and the limit is the sum of theirs. The logits are read. The
    evidence takes a product with all emissions, read once, or, with lists, a cache line for every
    number that it gathers from them (or all of them, if that is faster) and, if `grouped`, a
    product with the means of the groups. The chain multiplies with the transitions, read from
    memory in its first step and from a cache at best in the others. The emissions of its latents
    are read and the coupled log-probabilities written, to new memory if they are too many to be
    kept.
    """
    positions, square = shape.batch * shape.window, shape.latents**2
    emissions, result = 4 * shape.latents * shape.vocab, 4 * positions * shape.vocab
    if evidence == "exact":
        of_evidence = rates.limit(emissions, positions * emissions / 2)
    else:
        gathered = rates.limit(0, 0, scattered=LINE * num_listed * shape.latents)
        of_evidence = min(gathered, rates.limit(emissions, 0))
        if evidence == "grouped":
            of_evidence += rates.limit(4 * square + 8 * shape.vocab, 2 * positions * square)
    again = 4 * max(shape.window - 2, 0) * square
    of_chain = rates.limit(4 * square, 2 * positions * square, cached=again)
    new = result if result > KEPT else 0
    of_result = rates.limit(2 * result - new, 0, new=new)
    return rates.limit(result, 0) + of_evidence + of_chain + of_result


def streaming_limit(shape: Shape, rates: Rates, num_listed: int, evidence: str = "exact") -> float:
    """`head_step_limit` if all bytes were moved once, at the rate of a copy."""
    plain = Rates(rates.bytes_per_second, rates.flops_per_second)
    return head_step_limit(shape, plain, num_listed, evidence)


def measure(options: Options) -> Report:
    """Median seconds of `head_step` and `plain_step`, and their ratio, per batch size."""
    shape = QUICK if options.quick else LLADA_8B
    repeats = options.repeats_or(5)
    probes = RateProbes(options.device, options.quick)
    head = random_head(shape, options)
    circuit = (head.initial, head.transition, head.emission)
    rows, measured = [], {}
    for batch in [options.batch_size] if options.batch_size else [1, 8]:
        sized = replace(shape, batch=batch)
        window = random_window(sized, options)
        given = (window.logits, window.tokens, window.observed)
        listed = {mode: window.num_listed(mode) for mode in EVIDENCE}
        sides = probes.sides | {"plain": lambda given=given: plain_step(circuit, *given)}
        for mode in EVIDENCE:
            sides[mode] = partial(head_step, head, *given, evidence=mode)
        seconds = median_seconds(sides, repeats, options.device)
        rates = probes.rates(seconds)
        measured |= {f"{name}, batch {batch}": v for name, v in rates.as_dict().items()}
        for mode in EVIDENCE:
            least = head_step_limit(sized, rates, listed[mode], mode)
            streaming = streaming_limit(sized, rates, listed[mode], mode)
            rows.append(
                {
                    "batch": batch,
                    "evidence": mode,
                    "tokens read": listed[mode],
                    "plain paper, ms": 1e3 * seconds["plain"],
                    "head step, ms": 1e3 * seconds[mode],
                    "times faster": seconds["plain"] / seconds[mode],
                    "limit, ms": 1e3 * least,
                    "times the limit": seconds[mode] / least,
                    "times streaming": seconds[mode] / streaming,
                }
            )
    sizes = shape.as_dict() | {"dtype": "float32", "repeats": repeats}
    sizes |= {"entropy of a prediction, nats": mean_entropy(window.logits[:1])}
    del sizes["batch"]
    return Report("head-step", sizes, rows, measured)
