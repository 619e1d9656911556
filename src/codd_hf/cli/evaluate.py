"""`codd-hf evaluate`: measures on held-out text."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from .common import environment, load_pipeline

HELP = "Measure a coupled model on held-out text."
EXAMPLE = """example:
  codd-hf evaluate gap
  codd-hf evaluate gap --model runs/mine/pipeline --num-problems 100 --output gap.json

gap: per mask ratio, nats per masked token in one parallel step for the factorized backbone, the
raw product with the stage-1 circuit (alpha 0), the corrected one (alpha 1), other heads if any are
given and the model's own, and for the backbone that reveals one token at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("measure", choices=["gap"], help="what to measure")
    parser.add_argument("--model", help="a pipeline; default: the embedded one")
    parser.add_argument("--dataset", help="held-out examples; default: the model's `test.jsonl`")
    parser.add_argument("--stage1", help="a stage-1 head; default: the model's `stage1`, if any")
    parser.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another head of the same backbone, to measure beside the model's own; repeatable",
    )
    parser.add_argument("--num-problems", type=int, help="so many of the examples; default: all")
    parser.add_argument("--ratios", type=float, nargs="+", help="mask ratios; default 0.1 to 1.0")
    parser.add_argument("--batch-size", type=int, default=32, help="windows at once")
    parser.add_argument("--seed", type=int, default=0, help="chooses windows and masks")
    parser.add_argument("--output", help="JSON file; default: none is written")


def run(args: argparse.Namespace) -> None:
    from ..defaults import default_model
    from ..evaluation.gap import RATIOS, gap_table, measure_gap
    from ..modeling_head import CoDDHead
    from ..training.data import load_examples, tokenize_examples

    folder = Path(args.model or default_model())
    pipeline = load_pipeline(args.model)
    dataset = args.dataset or str(folder / "test.jsonl")
    examples = load_examples(dataset)[: args.num_problems]
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
    if pipeline.model.coupling_head is None:
        raise ValueError("`--model` has no head to measure: fit one with `codd-hf train`.")
    heads["fitted"] = pipeline.model.coupling_head
    for head in heads.values():
        head.to(pipeline.model.device)
    started = time.perf_counter()
    rows = measure_gap(
        pipeline.model,
        heads,
        pipeline.tokenizer,
        tokenize_examples(examples, pipeline.tokenizer),
        ratios=args.ratios or RATIOS,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    seconds = time.perf_counter() - started
    print(gap_table(rows))
    facts = environment() | {"examples": len(examples), "seed": args.seed}
    print("\n" + ", ".join(f"{k} {v}" for k, v in facts.items()) + f", {seconds:.0f} s")
    if args.output:
        result = {"environment": facts, "rows": [row.as_dict() for row in rows]}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
