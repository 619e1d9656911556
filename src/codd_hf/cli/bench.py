"""Measure speed on this machine."""

import argparse
from importlib import import_module

from ..benchmarks import BENCHMARKS, Options
from ..runtime.report import environment, listed
from .common import add_flags, check_writable, quiet_loading, settings_from, write_result

EXAMPLE = """example:
  codd-hf bench overhead --vocabularies 8192 32768 126464
  codd-hf bench head-step --output head-step.json
  codd-hf bench all --quick

""" + "\n".join(f"{name}: {text}." for name, text in BENCHMARKS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("name", choices=[*BENCHMARKS, "all"], help="what to measure")
    add_flags(parser, Options)


def run(args: argparse.Namespace) -> None:
    """Measures, and prints each benchmark as it ends."""
    options = settings_from(args, Options)
    check_writable(options.output)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device` is 'cuda', but torch finds no GPU here.")
    quiet_loading()
    reports = {}
    for name in list(BENCHMARKS) if args.name == "all" else [args.name]:
        module = import_module(f"..benchmarks.{name.replace('-', '_')}", __package__)
        report = module.measure(options)
        print(f"### {name}\n\n{report.markdown()}\n", flush=True)
        reports[name] = report.as_dict()
        write_result(options.output, {"options": vars(options), "benchmarks": reports})
    print(listed(environment()))
