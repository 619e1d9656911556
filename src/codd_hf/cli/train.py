"""Fit a head to a backbone's predictions (or train a small backbone and its head)."""

import argparse
from typing import Any

from ..training.settings import (
    build_config,
    config_text,
    from_text,
    named_settings,
    read_config,
)
from .common import add_flag, flag_of, quiet_loading

EXAMPLE = """example:
  codd-hf train --dataset my.jsonl --output runs/mine
  codd-hf train --dataset my.jsonl --backbone path/to/backbone --output runs/mine
  codd-hf train --print-config > run.yaml
  codd-hf train --config run.yaml --set conditional.learning_rate=1e-3

The result, runs/mine/pipeline, is for `codd-hf generate --model runs/mine/pipeline "..."`. A run
that stopped is continued by the same command.

several processes (the result is the same; examples/accelerate_configs/ has more):
  ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m codd_hf.cli train ...
  accelerate launch --multi_gpu --num_processes 2 -m codd_hf.cli train ..."""

FLAGS = (
    "dataset",
    "output_dir",
    "backbone",
    "stages",
    "dataset_config",
    "split",
    "sample_by",
    "prompt_column",
    "answer_column",
    "remove_pattern",
    "packing",
    "skip_bad_rows",
    "num_validation",
    "num_test",
    "num_gap_problems",
    "num_latents",
    "window_length",
    "conditioning",
    "generative.num_epochs",
    "conditional.max_steps",
    "conditional.num_draws",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "hub_model_id",
)
"""The settings that have a flag; `--set` and `--config` have all (`training.settings`)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    settings = dict(named_settings())
    for name in FLAGS:
        flag = "--output" if name == "output_dir" else flag_of(name)
        metavar = flag.rpartition("-")[2].upper()
        add_flag(parser, flag, settings[name], dest=name, type=str, metavar=metavar)
    parser.add_argument("--config", metavar="YAML", help="a file of settings; flags come before it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting, such as conditional.learning_rate=3e-3; may be repeated",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as YAML for --config"
    )


def run(args: argparse.Namespace) -> None:
    """Trains, or prints the settings."""
    values = read_config(args.config) if args.config else {}
    try:
        values |= _flags(args)
        if args.print_config:
            print(config_text(values), end="")
            return
        config = build_config(values)
    except ValueError as error:
        args.usage_error(str(error))
    from accelerate import PartialState

    from ..training.run import train

    quiet_loading()
    folder = train(config)
    processes = PartialState()
    if processes.is_main_process:
        print(f"The result is in {folder}.")
        if folder.name == "pipeline":
            print(f'Try: codd-hf generate --model {folder} "..."')
    processes.destroy_process_group()


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The values that flags and `--set` give, by names."""
    given = {name: getattr(args, name) for name in FLAGS if hasattr(args, name)}
    for pair in args.set:
        if "=" not in pair:
            raise ValueError(f"`--set` must be NAME=VALUE, got {pair!r}.")
        name, _, text = pair.partition("=")
        given[name.strip()] = text
    return {n: from_text(n, v) if isinstance(v, str) else v for n, v in given.items()}
