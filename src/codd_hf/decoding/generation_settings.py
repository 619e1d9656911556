"""Which of several sources settles a choice of a call: one rule for all doors.

The call counts first, then a generation configuration that it is given, then the model's own, then
the defaults of `DecodingCall`; for the draws, the scheduler in place of the model's configuration,
where there is one. The folder of a model carries the settings of its pipeline's scheduler in
`generation_config.json`, so that `CoDDModel.generate`, transformers' pipelines, `CoDDPipeline` and
the command line decode alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checks.arguments import (
    flag,
    integer,
    list_of_ids,
    plain,
    several,
    token_id,
    without_left_fields,
)
from ..coupling.windows import CoupledBackbone
from ..schedulers import CoDDScheduler
from ..schedulers.settings import LEFT, DrawSettings

DEFAULT_LENGTH = 128
DEFAULT_BLOCK_LENGTH = 32
LENGTHS = ("gen_length", "max_new_tokens", "max_length")
"""Names of one thing; `max_length` counts the prompt."""
SPECIAL_TOKENS = ("eos_token_id", "pad_token_id")
TASK = (
    *LENGTHS,
    "block_length",
    "num_inference_steps",
    "paradigm",
    "infill",
    "min_new_tokens",
    *SPECIAL_TOKENS,
)
"""Choices of what is decoded that a generation configuration may hold, beside `SETTINGS`."""
SETTINGS = tuple(field.name for field in fields(DrawSettings))
LEFT_ENTRIES = LEFT | {"windowing": "aligned", "free_length": False}
"""Entries of version 0.1, each with the value that is the only one now."""

Source = Mapping[str, Any]


def entries(generation_config: GenerationConfig) -> dict[str, Any]:
    """The entries of a generation configuration.

    Raises:
        ValueError: it asks for an option of an earlier version.
    """
    stored = generation_config.to_diff_dict()
    return without_left_fields(stored, LEFT_ENTRIES, "the generation configuration")


def first_of(names: Iterable[str], sources: Iterable[Source]) -> dict[str, Any]:
    """By name, the value of the first source that has one; other names are left out."""
    found: dict[str, Any] = {}
    for source in sources:
        has_length = not found.keys().isdisjoint(LENGTHS)
        for name in names:
            value = source.get(name)
            if value is not None and name not in found and not (has_length and name in LENGTHS):
                found[name] = value
    return found


def task_of(
    model: CoupledBackbone, *sources: Source, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """The choices in `TASK`, those that a source has; `eos_token_id` always, as a list.

    Args:
        model: gives its generation configuration and, after that, its special tokens.
        *sources: count before it, the first most.
        tokenizer: gives special tokens that the model does not know.

    Raises:
        TypeError, ValueError: a special token is none of the vocabulary.
    """
    parts = [part for part in (model.config, tokenizer) if part is not None]
    special = [{name: getattr(part, name) for name in SPECIAL_TOKENS} for part in parts]
    files = [entries(model.generation_config), *special]
    mask_token_id, vocab_size = model.config.mask_token_id, model.config.vocab_size
    for file in files:
        # A file that names the mask token as the end of texts knows no end.
        if file.get("eos_token_id") in (mask_token_id, [mask_token_id]):
            file["eos_token_id"] = None
    task = first_of(TASK, [*sources, *files])
    task["eos_token_id"] = list_of_ids("eos_token_id", task.get("eos_token_id"), vocab_size)
    if "pad_token_id" in task:
        task["pad_token_id"] = token_id("pad_token_id", task["pad_token_id"], vocab_size)
    return task


def with_defaults(
    task: dict[str, Any], model: CoupledBackbone, prompt_length: int
) -> dict[str, Any]:
    """A task as `DecodingCall` takes it: its length under one name, and nothing left open.

    Args:
        task: of `task_of`.
        model: a block-causal backbone gives the default of `block_length`.
        prompt_length: of the longest prompt, which `max_length` counts.

    Raises:
        TypeError, ValueError: `max_length` is no integer, or leaves nothing to generate.
    """
    attended = getattr(model.config.text_config, "block_length", None)
    length = task.get("gen_length", task.get("max_new_tokens"))
    if length is None and "max_length" in task and not task.get("infill"):
        length = integer("max_length", task["max_length"]) - prompt_length
        if length < 1:
            raise ValueError(
                f"`max_length` ({task['max_length']}) leaves nothing to generate after prompts of "
                f"{prompt_length} tokens: raise it, or give `max_new_tokens`."
            )
    lengths = several(length)
    if lengths is not None:
        length = [DEFAULT_LENGTH if each is None else each for each in lengths]
    return {
        "block_length": DEFAULT_BLOCK_LENGTH if attended is None else attended,
        **{name: value for name, value in task.items() if name not in LENGTHS},
        "gen_length": DEFAULT_LENGTH if length is None else length,
    }


def settings_of(sources: Sequence[Source], scheduler: CoDDScheduler | None = None) -> dict:
    """The draw settings that the sources have, the first source most; the scheduler has the rest.

    As in transformers, `do_sample=False` is temperature 0, and `do_sample=True` one above 0, by
    default 1.

    Raises:
        TypeError: `do_sample` is no bool.
    """
    settings = first_of(SETTINGS, sources)
    last = {} if scheduler is None else {"temperature": scheduler.config.temperature}
    draws = False
    for source in (*sources, last):
        do_sample, temperature = source.get("do_sample"), plain(source.get("temperature"))
        do_sample = None if do_sample is None else flag("do_sample", do_sample)
        if do_sample is False and not draws:
            return settings | {"temperature": 0.0}
        off = isinstance(temperature, (int, float)) and temperature == 0
        if temperature is not None and not (draws and off):
            return settings | {"temperature": temperature}
        draws = draws or bool(do_sample)
    return settings | ({"temperature": 1.0} if draws else {})


def scheduler_of(generation_config: GenerationConfig) -> CoDDScheduler:
    """A scheduler with the settings that a generation configuration has.

    Raises:
        TypeError, ValueError: a setting is out of its range.
    """
    return CoDDScheduler(**settings_of([entries(generation_config)]))


def with_settings_of(
    generation_config: GenerationConfig, scheduler: CoDDScheduler
) -> GenerationConfig:
    """A generation configuration by which a model decodes as a pipeline with a scheduler does."""
    config = copy.deepcopy(generation_config)
    for name in LEFT_ENTRIES:
        vars(config).pop(name, None)
    settings = dict(vars(scheduler.draw_settings()))
    # transformers stores the limits of a draw only beside `do_sample=True`.
    draws = settings["temperature"] > 0 or bool(settings["top_k"] or settings["top_p"])
    if not draws:
        settings |= dict.fromkeys(("temperature", "top_k", "top_p"))
    vars(config).update(settings, do_sample=draws, _from_model_config=False)
    if all(getattr(config, name, None) is None for name in LENGTHS):
        config.max_new_tokens = DEFAULT_LENGTH  # transformers' pipelines have a default of theirs
    return config
