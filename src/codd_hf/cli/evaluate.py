"""`codd-hf evaluate`: measures on held-out text."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from inspect import getdoc
from pathlib import Path

from ..evaluation.settings import GapSettings, QualitySettings
from ..runtime.environment import environment
from ..runtime.report import listed
from .common import check_writable, load_pipeline
from .options import add_flags, settings_from

HELP = "Measure a coupled model on held-out text."
EXAMPLE = """example:
  codd-hf evaluate gap
  codd-hf evaluate gap --model runs/mine/pipeline --num-problems 100 --output gap.json
  codd-hf evaluate quality --judge HuggingFaceTB/SmolLM2-135M-Instruct \\
      --choose-on validation.jsonl --output quality.json

`codd-hf evaluate gap --help` and `codd-hf evaluate quality --help` say what is measured."""
MEASURES = {
    "gap": ("what one parallel step loses", GapSettings),
    "quality": ("text quality against backbone passes", QualitySettings),
}
"""By name; `codd_hf.evaluation.<name>.evaluate` measures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure")
    for name, (text, settings) in MEASURES.items():
        measure = measures.add_parser(
            name,
            help=text,
            description=getdoc(settings),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_flags(measure, settings)
        measure.set_defaults(usage_error=measure.error)


def run(args: argparse.Namespace) -> None:
    settings = settings_from(args, MEASURES[args.measure][1])
    check_writable(settings.output)
    from ..data.sources import load_examples
    from ..hub.defaults import default_model

    pipeline = load_pipeline(settings.model)
    if pipeline.model.coupling_head is None:
        raise ValueError("`--model` has no head to measure: fit one with `codd-hf train`.")
    if pipeline.tokenizer is None:
        raise ValueError("`--model` has no tokenizer for the texts: save one beside the model.")
    folder = Path(settings.model or default_model())
    settings.dataset = settings.dataset or str(folder / "test.jsonl")
    examples = load_examples(settings.dataset, skip_bad_rows=settings.skip_bad_rows)
    measure = import_module(f"..evaluation.{args.measure}", __package__).evaluate
    report = measure(pipeline, examples[: settings.num_problems], settings)
    facts = environment() | report.facts
    print(f"{report.text}\n\n{listed(facts)}")
    if settings.output:
        written = {"environment": facts, **report.figures}
        Path(settings.output).write_text(json.dumps(written, indent=2) + "\n")
