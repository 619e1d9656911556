"""Which of several sources settles a choice of a call: one rule for all doors.

The call counts first, then a generation configuration that it is given, then the model's own, then
the defaults of `DecodingCall`; for the draws, the scheduler in place of the model's configuration.
The folder of a model carries the settings of its pipeline's scheduler in `generation_config.json`,
so that `CoDDModel.generate`, transformers' pipelines, `CoDDPipeline` and the command line decode
alike.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checks.arguments import flag, list_of_ids, shown, token_id
from ..coupling.windows import CoupledBackbone
from ..schedulers.scheduling_codd import CoDDScheduler
from ..schedulers.settings import DrawSettings
from .call import CHOICES, DEFAULT_LENGTH

SPECIAL_TOKENS = ("eos_token_id", "pad_token_id")
TASK = (
    "max_new_tokens",
    "gen_length",
    "block_length",
    "num_inference_steps",
    "paradigm",
    "infill",
    "min_new_tokens",
    "editing_threshold",
    *SPECIAL_TOKENS,
)
"""What is decoded, as a model's generation configuration says it."""
OF_ROWS = ("gen_length", "num_inference_steps", "min_new_tokens")
"""Choices of which a row may have its own, or None."""
SETTINGS = tuple(field.name for field in fields(DrawSettings))

Source = Mapping[str, Any]


def entries(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """The entries of a generation configuration."""
    if not isinstance(generation_config, GenerationConfig | None):
        raise TypeError(
            f"`generation_config` must be a GenerationConfig, got {shown(generation_config)}."
        )
    return {} if generation_config is None else generation_config.to_diff_dict()


def merged(*sources: Source) -> dict[str, Any]:
    """The choices of some sources, of which the last counts most; None says nothing.

    As in transformers, `max_new_tokens` is the length, `do_sample=False` is temperature 0, and
    `do_sample=True` one above 0, by default 1.
    """
    result: dict[str, Any] = {}
    for source in sources:
        choices = {name: value for name, value in source.items() if value is not None}
        length = choices.pop("max_new_tokens", None)
        if length is not None:
            choices.setdefault("gen_length", length)
        do_sample = choices.pop("do_sample", None)
        if do_sample is not None and not flag("do_sample", do_sample):
            choices["temperature"] = 0.0
        elif do_sample is not None and not result.get("temperature"):
            choices.setdefault("temperature", 1.0)
        for name in OF_ROWS:
            if isinstance(value := choices.get(name), list):
                choices[name] = [result.get(name) if each is None else each for each in value]
        result |= choices
    return result


def choices_of(
    model: CoupledBackbone, *sources: Source, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """The arguments of `DecodingCall` that a source has; `eos_token_id` always, as a list.

    The model's generation configuration counts less than the sources, of which the last counts
    most, and but for the draws; special tokens of the model's configuration and of the tokenizer
    count least.
    """
    parts = [part for part in (tokenizer, model.config) if part is not None]
    files = [{name: getattr(part, name) for name in SPECIAL_TOKENS} for part in parts]
    own, mask_token_id = entries(model.generation_config), model.config.mask_token_id
    files.append({name: own.get(name) for name in TASK})
    for file in files:
        # A file that names the mask token as the end of texts knows no end.
        if file["eos_token_id"] in (mask_token_id, [mask_token_id]):
            file["eos_token_id"] = None
    found, vocab_size = merged(*files, *sources), model.config.vocab_size
    choices = {name: found[name] for name in (*CHOICES, *SETTINGS) if name in found}
    choices["eos_token_id"] = list_of_ids("eos_token_id", found.get("eos_token_id"), vocab_size)
    if "pad_token_id" in found:
        choices["pad_token_id"] = token_id("pad_token_id", found["pad_token_id"], vocab_size)
    return choices


def settings_of(*sources: Source) -> dict[str, Any]:
    """The draw settings that some sources have, of which the last counts most."""
    return {name: value for name, value in merged(*sources).items() if name in SETTINGS}


def with_settings_of(
    generation_config: GenerationConfig | None, scheduler: CoDDScheduler
) -> GenerationConfig:
    """A generation configuration by which a model decodes as a pipeline with a scheduler does."""
    config = copy.deepcopy(generation_config or GenerationConfig())
    settings = dict(vars(scheduler.settings))
    # transformers stores the limits of a draw only beside `do_sample=True`.
    draws = settings["temperature"] > 0 or bool(settings["top_k"] or settings["top_p"])
    if not draws:
        settings |= dict.fromkeys(("temperature", "top_k", "top_p"))
    vars(config).update(settings, do_sample=draws, _from_model_config=False)
    if getattr(config, "gen_length", None) is None and config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_LENGTH  # transformers' pipelines have a default of theirs
    return config
