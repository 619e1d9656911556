"""Measure a coupled model on held-out text."""

import argparse
from dataclasses import replace
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation import MEASURES, MeasureSettings, ReportSettings
from ..runtime.report import environment, listed
from .common import (
    add_flags,
    check_writable,
    load_pipeline,
    quiet_loading,
    settings_from,
    write_result,
)

if TYPE_CHECKING:
    from accelerate import PartialState

EXAMPLE = """example:
  codd-hf evaluate gap
  codd-hf evaluate gap --model runs/mine/pipeline --num-problems 100 --output gap.json
  codd-hf evaluate answers --model runs/mine/pipeline --dataset gsm8k.jsonl --checker hashes
  codd-hf evaluate quality --judge HuggingFaceTB/SmolLM2-135M-Instruct \\
      --choose-on validation.jsonl --output quality.json
  codd-hf evaluate joint
  codd-hf evaluate report --output report

`codd-hf evaluate gap --help`, and so on, say what is measured."""


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
    """Measures, prints the tables and writes the figures; or writes a page of several measures."""
    settings = settings_from(args, MEASURES[args.measure])
    import torch
    from accelerate import PartialState

    # Without a GPU accelerate counts the processes of a launcher only if it is told to use the CPU.
    state = PartialState(cpu=not torch.cuda.is_available())
    if isinstance(settings, ReportSettings):
        from ..evaluation.plots import check_matplotlib
        from ..evaluation.report import write_page

        check_matplotlib()
        Path(settings.output).mkdir(parents=True, exist_ok=True)
        for name, part in settings.parts().items():
            _measure(name, part, state, anew=False)
        if state.is_main_process:
            print(f"The page is {write_page(Path(settings.output), settings.overhead)}.")
    else:
        _measure(args.measure, settings, state)
    state.destroy_process_group()


def _measure(name: str, settings: Any, state: "PartialState", anew: bool = True) -> None:
    """Prints and writes what a measure finds, unless it is there and need not be found `anew`."""
    check_writable(settings.output)
    from ..data.fingerprint import pipeline_fingerprint
    from ..data.sources import load_examples
    from ..data.tasks import TASKS
    from ..runtime.files import read_json

    about: dict[str, Any] = {"settings": {k: v for k, v in vars(settings).items() if k != "output"}}
    quiet_loading()
    if isinstance(settings, MeasureSettings):
        pipeline = load_pipeline(settings.model, state.device)
        about["model"] = pipeline_fingerprint(pipeline)
        if pipeline.model.coupling_head is None and name != "answers":
            raise ValueError("`--model` has no head to measure: fit one with `codd-hf train`.")
    if not anew and Path(settings.output).exists():
        found = read_json(Path(settings.output))
        if found | about == found:
            return
    measure = import_module(f"..evaluation.{name}", __package__).measure
    if isinstance(settings, MeasureSettings):
        settings = replace(settings, dataset=settings.dataset or _held_out(settings.model))
        split = settings.split or ("test[:1000]" if settings.dataset == TASKS else "train")
        options = {"split": split, "skip_bad_rows": settings.skip_bad_rows}
        examples = load_examples(settings.dataset, **options)[: settings.num_problems]
        report = measure(pipeline, examples, settings)
    else:
        from ..training.run import train
        from ..training.settings import build_config

        if state.num_processes > 1:
            raise ValueError(f"`{name}` trains its models in one process: run it by itself.")
        report = measure(settings, lambda values: train(build_config(values)))
    if state.is_main_process:
        print(f"{report.markdown()}\n\n{listed(environment())}")
        write_result(settings.output, about | report.as_dict())


def _held_out(model: str | None) -> str:
    """The examples that training kept for the end, or else for its choices; tasks by default."""
    from ..data.tasks import TASKS

    if model is None:
        return TASKS
    paths = [Path(model, name) for name in ("test.jsonl", "validation.jsonl")]
    return str(paths[1] if paths[1].exists() and not paths[0].exists() else paths[0])
