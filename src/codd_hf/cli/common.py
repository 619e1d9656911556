"""What several commands share: flags made of settings, loading, and writing answers and results."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..checks.errors import printable
from ..checks.settings import Natural, Setting, Settings, Share, settings_of
from ..runtime.report import as_json, environment, listed
from ..schedulers.settings import DrawSettings

if TYPE_CHECKING:
    import torch

    from ..pipelines.pipeline_codd import CoDDPipeline

Kind = TypeVar("Kind", bound=Settings)
SECOND_SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
CLEAR = "\x1b[H\x1b[2J"
MASK = "_"


@dataclass
class AnsweringSettings(Settings):
    """What commands that answer are told beside how to decode."""

    model: str | None = None
    """path or Hub id; default: the embedded model"""
    mask_token_id: Natural | None = None
    """the mask token of a backbone, if none of its files names one"""
    verbose: bool = False
    """say on standard error how the model decodes"""


@dataclass
class TaskSettings(Settings):
    """Choices of a call beside its draw settings; None for the model's own."""

    gen_length: int | None = None
    """tokens to generate; default: the model's, or else 128"""
    block_length: int | None = None
    """tokens decoded together; default: the model's, or else 32"""
    num_inference_steps: int | None = None
    """backbone passes for the whole text; default: one for four tokens, one for each with
    threshold and joint"""
    paradigm: str | None = None
    """block, from left to right, or full: any position in any step"""
    min_new_tokens: int | None = None
    """tokens before the text may end"""
    editing_threshold: Share | None = None
    """replace committed tokens where the backbone is surer than this of others; 1: never"""
    cache: str | None = None
    """prefix or dual: what the backbone need not read again within a block"""


DECODING = settings_of(TaskSettings) | settings_of(DrawSettings)


def add_flag(parser: argparse.ArgumentParser, flag: str, setting: Setting, **options: Any) -> None:
    """A flag, or an argument without dashes, for one setting, with its explanation as help."""
    text, shown = setting.doc.replace("%", "%%"), setting.default
    if shown not in (MISSING, None, [], False):
        text += f" (default {' '.join(map(str, shown)) if isinstance(shown, list) else shown})"
    options = {"type": (setting.entry or setting).kind, "default": argparse.SUPPRESS, **options}
    if setting.kind is bool:
        options = {"default": options["default"], "action": argparse.BooleanOptionalAction}
    elif setting.kind is list:
        options |= {"nargs": "*", "action": "extend" if flag.startswith("-") else "store"}
    parser.add_argument(flag, help=text, **options)


def add_flags(
    parser: argparse.ArgumentParser,
    kind: type[Settings],
    positional: Sequence[str] = (),
    decoding: bool = False,
) -> None:
    """A flag for each setting of a settings class.

    Args:
        parser: gets the flags.
        kind: the settings class.
        positional: names of settings that are arguments without dashes.
        decoding: whether lengths, passes and draw settings follow (default: the model's own).
    """
    for name, setting in settings_of(kind).items():
        if name in positional:
            add_flag(parser, name, setting)
        else:
            add_flag(parser, flag_of(name), setting, required=setting.default is MISSING)
    for name, setting in DECODING.items() if decoding else ():
        add_flag(parser, flag_of(name), replace(setting, default=None), default=None)


def flag_of(name: str) -> str:
    """The flag of a setting, of which a name with dots is in a part of another."""
    return f"--{re.sub('[._]', '-', name)}"


def settings_from(args: argparse.Namespace, kind: type[Kind]) -> Kind:
    """The settings that flags give; one that cannot be is bad usage."""
    names = [name for name in settings_of(kind) if hasattr(args, name)]
    try:
        return kind(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        return args.usage_error(str(error))


def decoding_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments from the command line's."""
    return {name: getattr(args, name) for name in DECODING}


def load_pipeline(
    name: str | None, device: torch.device | None = None, **given: Any
) -> CoDDPipeline:
    """The pipeline of a path or id, or the embedded default, on a device (default: a GPU's).

    What is `given` beside None is for `CoDDPipeline.from_pretrained`.

    Raises:
        ValueError: it has no tokenizer.
    """
    import torch

    from ..hub.repositories import default_model
    from ..pipelines.pipeline_codd import CoDDPipeline

    quiet_loading()
    said = {argument: value for argument, value in given.items() if value is not None}
    pipeline = CoDDPipeline.from_pretrained(name or default_model(), **said)
    if pipeline.tokenizer is None:
        raise ValueError(f"`--model` {name!r} has no tokenizer: save one beside the model.")
    return pipeline.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def answering_pipeline(
    settings: AnsweringSettings, call: dict[str, Any], device: torch.device | None = None
) -> CoDDPipeline:
    """The pipeline that answers; `call` is how it decodes, which is said if asked for."""
    from ..backbones import decoding_of
    from ..decoding.call import DecodingCall

    pipeline = load_pipeline(settings.model, device, mask_token_id=settings.mask_token_id)
    if settings.verbose:
        asked = {name: call[name] for name in DECODING}
        made = DecodingCall(pipeline.model, pipeline.scheduler, 1, **pipeline.task(**asked))
        facts = {"tokens": made.gen_length[0], "block": made.block_length or "none"}
        draws = {"editing_threshold": made.editing_threshold} | vars(made.scheduler.settings)
        facts |= {name: value for name, value in draws.items() if value is not None}
        own = decoding_of(pipeline.model.config.text_config)
        by = f" (the published model: {listed(own)})" if own else ""
        print(f"Decoding{by}: {listed(facts)}.", file=sys.stderr)
    return pipeline


def quiet_loading() -> None:
    """Loading a small model needs no progress bars, and an error of ours is one line."""
    import datasets
    import diffusers
    import transformers

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def write_answer(pipeline: CoDDPipeline, **call: Any) -> str:
    """Generates for one prompt, writes the text to standard output and returns it as it is.

    In a terminal the canvas is shown at every step, on the terminal's second screen, which leaves
    no trace on the first; a progress bar of the pipeline would get in its way.
    """
    from ..text.encoding import special_token_ids

    tokenizer, mask = pipeline.tokenizer, pipeline.model.config.mask_token_id
    unseen = special_token_ids(tokenizer) - {mask}
    watched = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def write(text: str) -> None:
        sys.stdout.write(text if watched else "")
        sys.stdout.flush()

    def show(pipeline: CoDDPipeline, step: int, timestep: Any, state: dict[str, Any]) -> dict:
        shown = state["generated"][0] | call.get("infill", False)
        tokens = state["canvas"][0][shown].tolist()
        text = tokenizer.decode([t for t in tokens if t not in unseen and t < len(tokenizer)])
        if mask is not None:
            text = text.replace(tokenizer.decode([mask]), MASK)
        write(CLEAR + printable(text))
        return {}

    names = ["canvas", "generated"]
    write(SECOND_SCREEN)
    try:
        output = pipeline(
            callback_on_step_end=show, callback_on_step_end_tensor_inputs=names, **call
        )
    finally:
        write(FIRST_SCREEN)
    text = "".join(output.texts or ())
    print(printable(text), flush=True)
    return text


def check_writable(path: str | None) -> None:
    """Raises an OSError before hours of work whose result could not be written."""
    if path is not None:
        place = path if os.path.exists(path) else os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.access(place, os.W_OK):
            raise OSError(f"`--output` {path!r} cannot be written: give a file in your own folder.")


def write_result(path: str | None, result: dict[str, Any]) -> None:
    """Writes a JSON file, with the machine and the versions, if one is asked for."""
    if path is not None:
        Path(path).write_text(as_json({"environment": environment(), **result}))
