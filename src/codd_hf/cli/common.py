"""What several commands share."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.errors import printable as printable
from ..checks.settings import Setting, Settings, settings_of
from ..schedulers.settings import DrawSettings
from .options import add_flag

if TYPE_CHECKING:
    import torch

    from ..pipelines.pipeline_codd import CoDDPipeline

LARGEST_SEED = 2**40


@dataclass
class TaskSettings(Settings):
    """Choices of a call beside its draw settings; None for the model's own."""

    gen_length: int | None = None
    """tokens to generate; default: the model's, or else 128"""
    block_length: int | None = None
    """tokens decoded together; default: the model's, or else 32"""
    num_inference_steps: int | None = None
    """backbone passes for the whole text; default: one for four tokens"""
    paradigm: str | None = None
    """block, from left to right, or full: any position in any step"""
    min_new_tokens: int | None = None
    """tokens before the text may end"""
    guidance_scale: float | None = None
    """of classifier-free guidance by the prompt; 0 is off"""
    cache: str | None = None
    """prefix or dual: what the backbone need not read again within a block"""


def seed(text: str) -> int:
    """An argument that is a seed; what is added to it for rows leaves torch's range open."""
    number = int(text)
    if abs(number) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be at most 2**40, got {number}")
    return number


def check_writable(path: str | None) -> None:
    """Finds before hours of work that a result could not be written.

    Raises:
        OSError: `path` is a folder, or in none, or may not be written.
    """
    if path is None:
        return
    place = Path(path) if Path(path).exists() else Path(path).parent
    if Path(path).is_dir() or not os.access(place, os.W_OK):
        raise OSError(f"`--output` {path!r} cannot be written: give a file in a folder of yours.")


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Lengths, passes, seed and the draw settings (default: the model's own)."""
    parser.add_argument("--seed", type=seed, default=0, help="seed of all draws")
    for name, setting in _decoding_settings().items():
        flag, kind = f"--{name.replace('_', '-')}", (setting.entry or setting).kind
        add_flag(parser, flag, replace(setting, default=None), type=kind)


def decoding_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments from the command line's."""
    return {name: getattr(args, name) for name in _decoding_settings()}


def _decoding_settings() -> dict[str, Setting]:
    return settings_of(TaskSettings) | settings_of(DrawSettings)


def load_pipeline(
    name: str | None, device: torch.device | None = None, **kwargs: Any
) -> CoDDPipeline:
    """The pipeline of a path or id, or the embedded default, on a device (default: a GPU's)."""
    import torch

    from ..hub.defaults import default_model
    from ..pipelines.pipeline_codd import CoDDPipeline

    quiet_loading()
    pipeline = CoDDPipeline.from_pretrained(name or default_model(), **kwargs)
    return pipeline.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def quiet_loading() -> None:
    """Loading a small model needs no progress bars, and an error of ours is one line."""
    import datasets
    import diffusers
    import transformers

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
