"""Texts of a single pass against sources whose probabilities are known.

A tiny backbone and its head learn a source from samples, as `codd-hf train` trains, and draw whole
texts in one pass. The reverse KL divergence `E_q[log q(x) - log p(x)]` of their law `q` from the
source's `p` is large where texts are incoherent, which the forward one, and so a likelihood of real
text, hardly shows (arXiv 2602.00286). All probabilities are exact, expectations are over drawn
texts, and no text is impossible, so that nothing needs to be smoothed.
"""

import json
import string
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import Report
from . import FACTORIZED, JointSettings
from .statistics import mean, ratio

LETTERS, LENGTH, CLASSES, STAYS, BALLS = string.ascii_letters[:32], 16, 4, 0.75, 0.25
NOISE = 0.02
"""Share of letters that are any, whatever the class of their place."""
Source = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], float]
"""How classes are drawn, the log-probability of texts, and the share of noise."""


def emission(noise: float) -> torch.Tensor:
    """`[CLASSES, letters]`: how likely each letter is at a place of a class; each has eight."""
    is_of = torch.arange(CLASSES)[:, None] == torch.arange(len(LETTERS)) % CLASSES
    return (1 - noise) * is_of.double() * CLASSES / len(LETTERS) + noise / len(LETTERS)


def block_classes(number: int, generator: torch.Generator) -> torch.Tensor:
    """Classes `[number, LENGTH]` of a Markov chain, which stays for a block and then goes on.

    After the Block-HMM of arXiv 2602.00286, whose blocks have parities, up to some noise. Ours have
    geometric lengths; their classes follow each other in a circle, and the noise is on letters.
    """
    goes = torch.rand(number, LENGTH, generator=generator) >= STAYS
    first = torch.randint(CLASSES, (number, 1), generator=generator)
    return (first + goes.long().cumsum(1)) % CLASSES


def block_log_prob(texts: torch.Tensor) -> torch.Tensor:
    """`[n]`, in nats, of texts `[n, length]` of such classes, by the forward recursion."""
    here = torch.eye(CLASSES, dtype=torch.float64)
    steps = STAYS * here + (1 - STAYS) * here.roll(1, 1)
    forward = torch.full((len(texts), CLASSES), 1 / CLASSES, dtype=torch.float64)
    for letter in texts.T:
        forward = forward @ steps * emission(NOISE)[:, letter].T
    return forward.sum(-1).log()


def palindrome_classes(number: int, generator: torch.Generator) -> torch.Tensor:
    """Classes `[number, LENGTH]` that read the same backwards; no HMM has so few states."""
    half = torch.randint(CLASSES, (number, LENGTH // 2), generator=generator)
    return torch.cat((half, half.flip(1)), 1)


def palindrome_log_prob(texts: torch.Tensor) -> torch.Tensor:
    """`[n]`, in nats, of texts `[n, length]` of such classes: pairs of letters share a class."""
    pairs = emission(NOISE)[:, texts] * emission(NOISE)[:, texts.flip(1)]
    return pairs.mean(0)[:, : texts.shape[1] // 2].log().sum(-1)


def urn_classes(number: int, generator: torch.Generator) -> torch.Tensor:
    """Classes `[number, LENGTH]` from Polya's urn: each that is drawn is put back with another.

    No HMM has this law at all lengths. There are `BALLS` of each class at first.
    """
    balls, classes = torch.full((number, CLASSES), BALLS), []
    for _ in range(LENGTH):
        classes.append(torch.multinomial(balls, 1, generator=generator))
        balls.scatter_add_(1, classes[-1], torch.ones(number, 1))
    return torch.cat(classes, 1)


def urn_log_prob(texts: torch.Tensor) -> torch.Tensor:
    """`[n]`, in nats, of texts `[n, length]` of such classes, without noise."""
    classes, before = texts % CLASSES, torch.arange(texts.shape[1])
    drawn = (classes[:, :, None] == classes[:, None]).tril(-1).sum(-1)
    likely = (BALLS + drawn.double()) / (BALLS * CLASSES + before) * CLASSES / len(LETTERS)
    return likely.log().sum(-1)


SOURCES: dict[str, Source] = {
    "block HMM": (block_classes, block_log_prob, NOISE),
    "urn": (urn_classes, urn_log_prob, 0.0),
    "palindromes": (palindrome_classes, palindrome_log_prob, NOISE),
}


def draw(source: Source, number: int, seed: int) -> torch.Tensor:
    """Texts `[number, LENGTH]` of numbers of letters."""
    generator = torch.Generator().manual_seed(seed)
    likely = emission(source[2])[source[0](number, generator)].flatten(0, 1)
    return torch.multinomial(likely, 1, generator=generator).view(number, LENGTH)


def measure(settings: JointSettings, train: Callable[..., Path]) -> Report:
    """`codd-hf evaluate joint`; `train` makes a pipeline of settings by their dotted names."""
    rows: list[dict[str, Any]] = []
    for name, source in SOURCES.items():
        found: dict[str, list[tuple[float, float]]] = {FACTORIZED: [], "CoDD": []}
        for seed in range(settings.seed, settings.seed + settings.num_seeds):
            pipeline = fitted(draw(source, settings.num_texts, seed), settings, train, seed)
            for law, head in ((FACTORIZED, False), ("CoDD", None)):
                found[law].append(divergences(pipeline, head, source, settings.num_samples, seed))
        reverse = {law: [figures[0] for figures in seeds] for law, seeds in found.items()}
        rows += [
            {
                "source": name,
                "law": law,
                "reverse KL, nats a text": mean(reverse[law]),
                "factorized / this": ratio(reverse[FACTORIZED], reverse[law]),
                "forward KL, nats a text": mean([figures[1] for figures in seeds]),
            }
            for law, seeds in found.items()
        ]
    return Report({k: v for k, v in vars(settings).items() if k != "output"}, {"rows": rows})


def fitted(texts: torch.Tensor, settings: JointSettings, train: Any, seed: int) -> CoDDPipeline:
    """A pipeline that is trained on texts and draws letters alone."""
    with TemporaryDirectory() as folder:
        spelt = ("".join(LETTERS[letter] for letter in text) for text in texts.tolist())
        Path(folder, "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in spelt))
        made = train(
            {
                "dataset": f"{folder}/texts.jsonl",
                "output_dir": f"{folder}/run",
                "vocab_size": 261,  # the fewest: bytes, and so letters, are tokens
                "hidden_size": 64,
                "num_layers": 2,
                "window_length": LENGTH + 1,  # and its end
                "num_latents": len(LETTERS),
                "num_gap_problems": 0,
                "conditioning": ["latent"],  # there is nothing to copy from
                "pretraining.max_steps": 100,  # of texts alone there is little to learn
                "pretraining.tokens_per_batch": 2048,
                "pretraining.window_probability": 1,
                "conditional.max_steps": settings.num_steps,
                "conditional.num_draws": 1,
                "conditional.emission_power": 1,
                "conditional.transition_power": 1,
            }
            | {f"{stage}.seed": seed for stage in ("pretraining", "generative", "conditional")}
            | {f"{stage}.max_extra_windows": 0 for stage in ("pretraining", "conditional")}
        )
        pipeline = CoDDPipeline.from_pretrained(made)
    model: Any = pipeline.model
    for part in (model, model.coupling_head):
        others = {*range(model.config.vocab_size)} - {*tokens_of(pipeline)}
        part.config.forbidden_token_ids = sorted(others)
    return pipeline


def tokens_of(pipeline: CoDDPipeline) -> list[int]:
    """The token of each letter."""
    return [pipeline.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]


@torch.no_grad()
def divergences(
    pipeline: CoDDPipeline, head: Any, source: Source, number: int, seed: int
) -> tuple[float, float]:
    """Reverse and forward KL of a single pass, in nats a text; `head` as in a model's call."""
    ids = torch.full((1, LENGTH), pipeline.model.mask_token_id)
    window: Any = {"window_start": torch.zeros(1, dtype=torch.long), "return_distribution": True}
    law = pipeline.model(ids, head=head, **window).distribution
    tokens = torch.tensor(tokens_of(pipeline))
    drawn = law.sample((number,), torch.Generator().manual_seed(seed))
    texts = (drawn[:, 0, :LENGTH, None] == tokens).long().argmax(-1)
    real = draw(source, number, seed + 2**32)
    spelt = torch.zeros_like(drawn)  # 0 is absent
    spelt[:, 0, :LENGTH] = tokens[real]
    reverse = law.log_prob(drawn)[:, 0] - source[1](texts)
    forward = source[1](real) - law.log_prob(spelt)[:, 0]
    return reverse.mean().item(), forward.mean().item()
