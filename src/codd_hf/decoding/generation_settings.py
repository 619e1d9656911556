"""What a call of decoding does where it does not say: one rule for all who decode.

What counts first is the call, then a generation configuration that it is given, then the model's
own, then the defaults here; of what shapes a draw, the scheduler's in place of the model's, where
there is one. The folder of a model carries the settings of its pipeline's scheduler in
`generation_config.json`, so that `CoDDModel.generate`, transformers' pipelines, `CoDDPipeline` and
the command line decode alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checks.arguments import end_tokens, flag, integer, plain, several, token_id
from ..checks.versions import without_left_fields
from ..schedulers import CoDDScheduler
from ..schedulers.settings import LEFT, DrawSettings

if TYPE_CHECKING:
    from ..modeling_codd import CoDDModel

DEFAULT_LENGTH = 128
DEFAULT_BLOCK_LENGTH = 32
LENGTHS = ("gen_length", "max_new_tokens", "max_length")
"""Names of one thing; `max_length` counts the prompt."""

TASK = (
    *LENGTHS,
    "block_length",
    "num_inference_steps",
    "paradigm",
    "infill",
    "min_new_tokens",
    "eos_token_id",
    "pad_token_id",
)
SETTINGS = tuple(field.name for field in fields(DrawSettings))

LEFT_TASK = {"windowing": "aligned", "free_length": False}
"""Of version 0.1, each with the value that is the only one now."""

Source = Mapping[str, Any]


def entries(generation_config: GenerationConfig) -> dict[str, Any]:
    """What a generation configuration says.

    Raises:
        ValueError: it asks for what an earlier version had.
    """
    said = generation_config.to_diff_dict()
    return without_left_fields(said, LEFT | LEFT_TASK, "the generation configuration")


def first_said(names: Sequence[str], sources: Sequence[Source]) -> dict[str, Any]:
    """What the first of the sources that says it says, by name; None where none does."""
    said = dict.fromkeys(names)
    for source in sources:
        has_length = any(said.get(name) is not None for name in LENGTHS)
        for name in names:
            if said[name] is None and not (has_length and name in LENGTHS):
                said[name] = source.get(name)
    return said


def said_of_task(
    model: CoDDModel, *sources: Source, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """What is to be decoded, by the names in `TASK`; `eos_token_id` as a list.

    Args:
        model: gives its generation configuration and, after that, its special tokens.
        *sources: what counts before it, the first most.
        tokenizer: gives special tokens that the model does not know.

    Raises:
        TypeError, ValueError: a special token is none of the vocabulary.
    """
    tokens = ("eos_token_id", "pad_token_id")
    parts = [part for part in (model.config, tokenizer) if part is not None]
    special = [{name: getattr(part, name) for name in tokens} for part in parts]
    files = [entries(model.generation_config), *special]
    mask_token_id, vocab_size = model.config.mask_token_id, model.config.vocab_size
    for part in files:
        # A file that names the mask token as the end of texts knows no end.
        if part.get("eos_token_id") in (mask_token_id, [mask_token_id]):
            part["eos_token_id"] = None
    said = first_said(TASK, [*sources, *files])
    said["eos_token_id"] = end_tokens("eos_token_id", said["eos_token_id"], vocab_size)
    if said["pad_token_id"] is not None:
        said["pad_token_id"] = token_id("pad_token_id", said["pad_token_id"], vocab_size)
    return said


def task_of_call(said: Source, model: CoDDModel, prompt_length: int) -> dict[str, Any]:
    """The arguments of `decoding.denoise` that say what is decoded, with defaults.

    Args:
        said: of `said_of_task`.
        model: a block-causal backbone gives the default of `block_length`.
        prompt_length: of the longest prompt, which `max_length` counts.

    Raises:
        TypeError: `max_length` is no integer, or `infill` no bool.
        ValueError: `max_length` leaves nothing to generate.
    """
    attended = getattr(model.config.text_config, "block_length", None)
    default = {
        "block_length": DEFAULT_BLOCK_LENGTH if attended is None else attended,
        "paradigm": "block",
        "infill": False,
    }
    task = {name: said[name] for name in TASK if name not in LENGTHS}
    task |= {name: value for name, value in default.items() if task[name] is None}
    infill = flag("infill", task["infill"])
    return task | {"gen_length": 1 if infill else _generated_length(said, prompt_length)}


def _generated_length(said: Source, prompt_length: int) -> Any:
    for name in ("gen_length", "max_new_tokens"):
        if said[name] is not None:
            each = several(said[name])
            if each is None:
                return said[name]
            return [DEFAULT_LENGTH if length is None else length for length in each]
    if said["max_length"] is None:
        return DEFAULT_LENGTH
    most = integer("max_length", said["max_length"])
    if most <= prompt_length:
        raise ValueError(
            f"`max_length` ({most}) leaves nothing to generate after prompts of {prompt_length} "
            "tokens: raise it, or give `max_new_tokens`."
        )
    return most - prompt_length


def settings_of_call(sources: Sequence[Source], scheduler: CoDDScheduler) -> dict[str, Any]:
    """What shapes the draws of a call; None where the scheduler's settings hold.

    Args:
        sources: what counts before the scheduler, the first most. As in transformers,
            `do_sample=False` is temperature 0, and `do_sample=True` one above 0, by default 1.
        scheduler: of the call.

    Raises:
        TypeError: `do_sample` is no bool.
    """
    last = {"temperature": scheduler.config.temperature}
    return first_said(SETTINGS, sources) | {"temperature": _temperature([*sources, last])}


def _temperature(sources: Sequence[Source]) -> float | None:
    draws = False
    for source in sources:
        do_sample, temperature = source.get("do_sample"), plain(source.get("temperature"))
        do_sample = None if do_sample is None else flag("do_sample", do_sample)
        if do_sample is False and not draws:
            return 0.0
        off = isinstance(temperature, (int, float)) and temperature == 0
        if temperature is not None and not (draws and off):
            return temperature
        draws = draws or bool(do_sample)
    return 1.0 if draws else None


def scheduler_of(generation_config: GenerationConfig) -> CoDDScheduler:
    """A scheduler with the settings that a generation configuration has.

    Raises:
        TypeError, ValueError: a setting is out of its range.
    """
    own = entries(generation_config)
    settings = first_said(SETTINGS, [own]) | {"temperature": _temperature([own])}
    return CoDDScheduler(**{name: v for name, v in settings.items() if v is not None})


def with_settings_of(
    generation_config: GenerationConfig, scheduler: CoDDScheduler
) -> GenerationConfig:
    """A generation configuration by which a model decodes as a pipeline with a scheduler does."""
    config = copy.deepcopy(generation_config)
    for name in (LEFT | LEFT_TASK).keys() & vars(config).keys():
        delattr(config, name)
    settings = {name: getattr(scheduler.draw_settings(), name) for name in SETTINGS}
    # transformers stores the limits of a draw only beside `do_sample=True`.
    draws = settings["temperature"] > 0 or bool(settings["top_k"] or settings["top_p"])
    if not draws:
        settings |= dict.fromkeys(("temperature", "top_k", "top_p"))
    for name, value in ({"do_sample": draws} | settings).items():
        setattr(config, name, value)
    if all(getattr(config, name, None) is None for name in LENGTHS):
        config.max_new_tokens = DEFAULT_LENGTH  # transformers' pipelines have a default of theirs
    config._from_model_config = False
    return config
