"""Measure a coupled model on held-out text."""

import argparse
from importlib import import_module
from inspect import getdoc
from pathlib import Path

from ..evaluation import MEASURES
from ..runtime.report import environment, listed
from .common import add_flags, check_writable, load_pipeline, settings_from, write_result

EXAMPLE = """example:
  codd-hf evaluate gap
  codd-hf evaluate gap --model runs/mine/pipeline --num-problems 100 --output gap.json
  codd-hf evaluate quality --judge HuggingFaceTB/SmolLM2-135M-Instruct \\
      --choose-on validation.jsonl --output quality.json

`codd-hf evaluate gap --help` and `codd-hf evaluate quality --help` say what is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each measure, and its flags."""
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure")
    for name, settings in MEASURES.items():
        text = getdoc(settings) or ""
        measure = measures.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_flags(measure, settings)
        measure.set_defaults(usage_error=measure.error)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables and writes the figures."""
    settings = settings_from(args, MEASURES[args.measure])
    check_writable(settings.output)
    from ..data.sources import load_examples
    from ..hub.repositories import default_model

    pipeline = load_pipeline(settings.model)
    if pipeline.model.coupling_head is None:
        raise ValueError("`--model` has no head to measure: fit one with `codd-hf train`.")
    folder = Path(settings.model or default_model())
    settings.dataset = settings.dataset or str(folder / "test.jsonl")
    examples = load_examples(settings.dataset, skip_bad_rows=settings.skip_bad_rows)
    measure = import_module(f"..evaluation.{args.measure}", __package__).measure
    report = measure(pipeline, examples[: settings.num_problems], settings)
    print(f"{report.markdown()}\n\n{listed(environment())}")
    write_result(settings.output, report.as_dict())
