"""A head step against a plain reading of the paper, `circuits.reference`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..circuits.reference import plain_step
from ..configuration_codd import CoDDHeadConfig
from ..modeling_head import DEFAULT_EVIDENCE_SIZE, CoDDHead
from ..runtime.report import Report
from . import Options, Side, median_seconds

SPREAD, SHARED = 5.0, 0.68
"""Standard deviation of logits, and the share of their variance that predictions have in common."""

EVIDENCE = {"exact": 0, "listed": DEFAULT_EVIDENCE_SIZE}
"""Tokens of a prediction that a step reads; 0 for all."""


def measure(options: Options) -> Report:
    """`codd-hf bench head-step`: a row for each form of evidence."""
    rows: list[dict[str, Any]] = []
    for case in head_cases(options, 1, 8):
        steps = case.steps()
        sides: dict[str, Side] = steps | {"plain": case.plain_step}
        seconds = median_seconds(sides, options.repeats, options.device)
        rows += [
            {
                **case.sizes,
                "evidence": name,
                "tokens read": case.num_read(name),
                "plain paper, ms": 1e3 * seconds["plain"],
                "head step, ms": 1e3 * seconds[name],
                "times faster": seconds["plain"] / seconds[name],
            }
            for name in steps
        ]
    return Report({"dtype": "float32", "repeats": options.repeats}, {"rows": rows})


class HeadCase:
    """A head with normalised potentials, and `batch` windows of masked positions.

    Predictions share a part of their logits, as the frequencies of tokens are shared: of the lists
    of `DEFAULT_EVIDENCE_SIZE` tokens of a window 51 % are distinct, of those of eight windows 18 %;
    a language model has 39 and 18 % (SmolLM2-135M on GSM8K, `examples/listed_tokens.py`). The last
    token is the mask token.
    """

    def __init__(self, batch: int, vocabulary: int, options: Options) -> None:
        window, states = (8, 32) if options.quick else (32, 1024)
        self.sizes = {"batch": batch, "vocabulary": vocabulary, "window": window, "states": states}
        config = CoDDHeadConfig(
            vocab_size=vocabulary,
            num_latents=states,
            window_length=window,
            mask_token_id=vocabulary - 1,
        )
        device = options.device
        with torch.device(device):
            head = CoDDHead(config).eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(options.seed)
        self.circuit = (head.initial, head.transition, head.emission)
        for parameter in self.circuit:
            parameter.normal_(0.0, 2.0, generator=generator)
            parameter.sub_(parameter.logsumexp(-1, keepdim=True))
        head.token_marginal.fill_(1 / vocabulary)
        self.frozen = head.frozen()
        size = (batch, window, vocabulary)
        self.logits = torch.randn(size, generator=generator, device=device)
        shared = torch.randn(vocabulary, generator=generator, device=device)
        self.logits.mul_((1 - SHARED) ** 0.5).add_(shared, alpha=SHARED**0.5).mul_(SPREAD)
        self.logits[..., -1] = -torch.inf
        self.tokens = torch.full(size[:2], vocabulary - 1, device=device)
        self.observed = torch.zeros_like(self.tokens, dtype=torch.bool)

    def steps(self) -> dict[str, Side]:
        """The step with each form of evidence; decoding takes lists for a large vocabulary."""
        return {name: partial(self._step, name) for name in EVIDENCE}

    @torch.no_grad()
    def _step(self, evidence: str) -> torch.Tensor:
        """A head's part of a denoising step: evidence, filter, latents, `[B, L, V]` log-probs."""
        size = EVIDENCE[evidence]
        distribution = self.frozen(self.logits, self.tokens, self.observed, top_k=size)
        return distribution.logits_given(distribution.sample_latents())

    def plain_step(self) -> tuple[torch.Tensor, ...]:
        """The same as the paper states it."""
        return plain_step(self.circuit, self.logits, self.tokens, self.observed)

    def num_read(self, evidence: str) -> int:
        """How many tokens the step reads: those in the list of any prediction."""
        size = EVIDENCE[evidence] or self.sizes["vocabulary"]
        return len(self.logits.topk(size, -1, sorted=False).indices.unique())


def head_cases(options: Options, *batches: int, vocabulary: int = 126_464) -> Iterator[HeadCase]:
    """A case of each vocabulary and batch size; `vocabulary` and `batches` are the usual ones."""
    for size in options.vocabularies or [512 if options.quick else vocabulary]:
        for batch in options.batches_or(*batches):
            yield HeadCase(batch, size, options)
