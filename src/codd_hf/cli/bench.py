"""`codd-hf bench`: speed and memory on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..benchmarks import BENCHMARKS, Options, run_benchmark
from ..checks.errors import reason
from ..runtime.environment import environment
from ..runtime.report import listed
from .common import check_writable, quiet_loading
from .options import add_flags, settings_from

HELP = "Measure speed and memory on this machine."
EXAMPLE = """example:
  codd-hf bench overhead
  codd-hf bench head-step --threads 2 --output head-step.json
  codd-hf bench all --quick

""" + "\n".join(f"{name}: {text}." for name, text in BENCHMARKS.items())

MOST_THREADS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*BENCHMARKS, "all"], help="what to measure")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--output", help="JSON file; default: none is written")
    add_flags(parser, Options)


def run(args: argparse.Namespace) -> None:
    options = settings_from(args, Options)
    check_writable(args.output)
    import torch

    try:
        torch.empty(1, device=options.device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without
        raise ValueError(
            f"`--device` must be one that torch has here, got {options.device!r} ({reason(error)})."
        ) from error
    if args.threads is not None:
        if not 1 <= args.threads <= MOST_THREADS:
            args.usage_error(f"`--threads` must be from 1 to {MOST_THREADS}, got {args.threads}.")
        torch.set_num_threads(args.threads)
    quiet_loading()
    facts = environment() | {"quick": options.quick, "seed": options.seed}
    reports = {}
    for name in list(BENCHMARKS) if args.name == "all" else [args.name]:
        report = run_benchmark(name, options)
        print(report.markdown() + "\n", flush=True)
        reports[name] = report.as_dict()
        if args.output:
            result = {"environment": facts, "benchmarks": reports}
            Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(listed(facts))
