"""`codd-hf train`: fit a head to a backbone, or train both from a text."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from .common import seed

if TYPE_CHECKING:
    from ..training.settings import TrainConfig

HELP = "Fit a head to a backbone's predictions (or train a small backbone and its head)."
EXAMPLE = """example:
  codd-hf train --dataset my.jsonl --output runs/mine
  codd-hf train --dataset my.jsonl --backbone path/to/backbone --output runs/mine

The result, runs/mine/pipeline, is for `codd-hf generate --model runs/mine/pipeline "..."`. A run
that stopped is continued by the same command.

several processes (the result is the same; examples/accelerate_configs/ has more):
  ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m codd_hf.cli train ...
  accelerate launch --multi_gpu --num_processes 2 -m codd_hf.cli train ..."""

SHORT = {"conditional_keep": "--keep"}
"""Second names of options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.settings import TrainConfig

    docs = _attribute_docs(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if _is_stage(field):
            _add_stage(parser, field)
            continue
        name = "output" if field.name == "output_dir" else field.name
        missing = dataclasses.MISSING
        required = field.default is missing and field.default_factory is missing
        _add_field(parser, name, field, field.name, docs, required)


def _is_stage(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(field.default_factory)


def _add_stage(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    stage = field.default_factory
    docs = _attribute_docs(stage)
    group = parser.add_argument_group(f"stage: {field.name}")
    for part in dataclasses.fields(stage):
        name = f"{field.name}_{part.name}"
        _add_field(group, name, part, name, docs | {name: docs.get(part.name, "")}, False)


def _add_field(parser, name, field, dest, docs, required) -> None:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    text = docs.get(dest, "").replace("%", "%%")
    if not required and default not in (None, []):
        shown = " ".join(default) if isinstance(default, list) else default
        text += f" (default {shown})"
    kind = field.type.split(" |")[0]
    options: dict = {"dest": dest}
    if kind == "bool":
        options["action"] = argparse.BooleanOptionalAction
    elif kind == "list[str]":
        options["nargs"] = "*"
    else:
        types = {"int": seed if name.endswith("seed") else int, "float": float, "str": str}
        options["type"] = types[kind]
    dashed = f"--{name.replace('_', '-')}"
    names = [SHORT[name], dashed] if name in SHORT else [dashed]
    parser.add_argument(
        *names, **options, help=text, **({"required": True} if required else {"default": default})
    )
    if "_" in name:
        # The Trainer's and Accelerate's spelling of the same.
        parser.add_argument(
            f"--{name}", **options, help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )


def _attribute_docs(config: type) -> dict[str, str]:
    """What the `Attributes` section of a configuration's docstring says of each field."""
    docs: dict[str, str] = {}
    name = None
    for line in (config.__doc__ or "").split("Attributes:")[-1].splitlines():
        start = line.strip().split(":", 1)
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and len(start) == 2:
            name = start[0]
            docs[name] = start[1].strip()
        elif name is not None and line.strip():
            docs[name] += " " + line.strip()
    return docs


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..training.run import train
    from .common import quiet_loading

    quiet_loading()
    try:
        config = _config(args)
    except ValueError as error:
        args.usage_error(str(error))
    folder = train(config)
    processes = PartialState()
    if processes.is_main_process:
        print(f"The result is in {folder}.")
        if folder.name == "pipeline":
            print(f'Try: codd-hf generate --model {folder} "..."')
    processes.destroy_process_group()


def _config(args: argparse.Namespace) -> TrainConfig:
    from ..training.settings import TrainConfig

    values = {}
    for field in dataclasses.fields(TrainConfig):
        if _is_stage(field):
            stage = field.default_factory
            parts = [part.name for part in dataclasses.fields(stage)]
            values[field.name] = stage(**{p: getattr(args, f"{field.name}_{p}") for p in parts})
        else:
            values[field.name] = getattr(args, field.name)
    return TrainConfig(**values)
