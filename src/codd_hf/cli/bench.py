"""`codd-hf bench`: speed and memory on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..benchmarks import BENCHMARKS, Options, run_benchmark
from ..checks.errors import reason
from ..runtime.environment import environment
from .common import check_writable, quiet_loading, seed

HELP = "Measure speed and memory on this machine."
EXAMPLE = """example:
  codd-hf bench overhead
  codd-hf bench head-step --threads 2 --output head-step.json
  codd-hf bench all --quick

""" + "\n".join(f"{name}: {text}." for name, text in BENCHMARKS.items())


MOST_THREADS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*BENCHMARKS, "all"], help="what to measure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--batch-size", type=int, help="rows at once; default: each benchmark's")
    parser.add_argument("--repeats", type=int, help="timed runs; default: each benchmark's")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, logits and draws")
    parser.add_argument("--output", help="JSON file; default: none is written")


def run(args: argparse.Namespace) -> None:
    import torch

    options = Options(args.quick, args.device, args.batch_size, args.repeats, args.seed)
    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without
        raise ValueError(
            f"`--device` must be one that torch has here, got {args.device!r} ({reason(error)})."
        ) from error
    check_writable(args.output)
    if args.threads is not None:
        if not 1 <= args.threads <= MOST_THREADS:
            raise ValueError(
                f"`--threads` must be from 1 to {MOST_THREADS}, got {args.threads}: give no more "
                "than this machine has."
            )
        torch.set_num_threads(args.threads)
    quiet_loading()
    facts = environment() | {"quick": args.quick, "seed": args.seed}
    reports = {}
    for name in list(BENCHMARKS) if args.name == "all" else [args.name]:
        report = run_benchmark(name, options)
        print(report.markdown() + "\n", flush=True)
        reports[name] = report.as_dict()
        if args.output:
            result = {"environment": facts, "benchmarks": reports}
            Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
