"""`CoDDModel.generate`: the denoising loop under the names of transformers' `generate`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
)
from transformers.generation.streamers import BaseStreamer

from ..checks.arguments import (
    check_token_types,
    integer,
    padding_mask,
    plain,
    several,
    shown,
    token_ids,
)
from ..coupling.windows import CoupledBackbone
from ..schedulers import CoDDScheduler
from .call import DecodingCall, check_scheduler
from .generation_settings import (
    SETTINGS,
    TASK,
    entries,
    first_of,
    scheduler_of,
    settings_of,
    task_of,
    with_defaults,
)
from .loop import denoise
from .streaming import BlockStream, OnStep

CONFIGURABLE = (*TASK, "do_sample", "num_return_sequences", *SETTINGS)
"""Arguments of a call or a generation configuration."""

OF_A_CALL = (
    "generator",
    "early_stop",
    "forced_tokens",
    "logits_processor",
    "cache",
    "guidance_scale",
    "head",
)
"""Arguments of a call alone."""

OF_EACH_ROW = {
    "gen_length",
    "num_inference_steps",
    "min_new_tokens",
    "forced_tokens",
    "guidance_scale",
}
"""Arguments that may be lists, with an entry for each prompt."""

WITHOUT_EFFECT = (
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "disable_compile",
    "transformers_version",
)
"""Arguments that transformers' callers pass along and that change nothing here."""

OFF_AT_ONE = (
    "encoder_repetition_penalty",
    "guidance_scale",
    "length_penalty",
    "num_beam_groups",
    "num_beams",
    "top_h",
    "typical_p",
)
"""Arguments of transformers that decoding by diffusion has not, of which 1 asks for nothing."""


def generate(
    model: CoupledBackbone,
    inputs: torch.Tensor | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    scheduler: CoDDScheduler | None = None,
    on_step: OnStep | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Decodes by diffusion.

    The arguments in `kwargs` may stand in a generation configuration as well, but for those that
    are marked. The call comes first, then `generation_config`, then `model.generation_config`; for
    the draws, the scheduler's settings in place of the latter, if the call has one. Sampling is
    told as in transformers: `do_sample=False` is temperature 0, at which nothing is drawn, and
    `do_sample=True` without a temperature is temperature 1.

    Args:
        model: the backbone, with or without a head.
        inputs: `[batch, prompt_length]`, padded on any side; with `infill`, templates with mask
            tokens where a token is to be found. A prompt may be empty (`[batch, 0]`); default, one
            that is.
        input_ids: another name of `inputs`.
        attention_mask: `[batch, prompt_length]`, 0 at padding; default, as in transformers, 0 at
            `pad_token_id` (default the model's), unless that ends texts as well.
        generation_config: in place of further arguments.
        scheduler: default, one with the settings of `model.generation_config`.
        on_step: as for [`~codd_hf.decoding.loop.denoise`].
        streamer: hears the prompts, a draft after every step and the blocks as they are completed
            (see `streaming.BlockStream`), for example `transformers.TextDiffusionStreamer`, which
            takes one row.
        **kwargs: `max_new_tokens` (or `gen_length`, default 128; or `max_length`, with the prompt),
            `num_return_sequences`, `do_sample`, and the arguments of
            [`~codd_hf.decoding.call.DecodingCall.of`]: `block_length` (default 32, or the blocks of
            a block-causal backbone), `num_inference_steps` (default one for four tokens, and at
            least one per block), `paradigm`, `infill`, `min_new_tokens`, `eos_token_id` and
            `pad_token_id` (default the model's), the scheduler's settings (`temperature`, `top_k`,
            `top_p`, `strategy`, `sampling`, `repetition_penalty`, ...) and, of the call alone,
            `generator`, `early_stop`, `forced_tokens`, `logits_processor`, `cache`,
            `guidance_scale` and `head`.

    Returns:
        `[batch * num_return_sequences, prompt_length + n]`: the prompts as they were given, and
        the `n` tokens of the longest text after them; behind the end of a text is padding
        (`pad_token_id`), or the first end-of-text token of a model that has none. With `infill`,
        `[batch * num_return_sequences, length]`: the templates with their gaps filled.

    Raises:
        ValueError: an argument is out of range, or it asks for something that decoding by diffusion
            has not (`num_beams=4`).
        TypeError: an argument is not known.
    """
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` are two names of one argument: give one.")
    name = "inputs" if input_ids is None else "input_ids"
    inputs = input_ids if inputs is None else inputs
    if inputs is None:
        inputs = torch.empty(1, 0, dtype=torch.long, device=model.device)
    inputs = token_ids(name, inputs, model.config.vocab_size, model.device)
    check_token_types(kwargs.pop("token_type_ids", None))
    if not isinstance(generation_config, GenerationConfig | None):
        raise TypeError(
            f"`generation_config` must be a GenerationConfig, got {shown(generation_config)}."
        )
    choices = {name: kwargs.pop(name) for name in OF_A_CALL if name in kwargs}
    given = {} if generation_config is None else entries(generation_config)
    own = entries(model.generation_config)
    _check_names(kwargs, given, own)
    draws, temperature = (plain(kwargs.get(name)) for name in ("do_sample", "temperature"))
    if draws is True and isinstance(temperature, (int, float)) and temperature == 0:
        raise ValueError(
            "`do_sample=True` draws, and `temperature=0` takes the most probable token: give one "
            "of them."
        )
    task = task_of(model, kwargs, given)
    choices |= with_defaults(task, model, inputs.shape[1])
    scheduler = scheduler_of(model.generation_config) if scheduler is None else scheduler
    if attention_mask is None:
        attention_mask = model.real_tokens(inputs, task.get("pad_token_id"), task["eos_token_id"])
    else:
        attention_mask = padding_mask("attention_mask", attention_mask, inputs.shape, inputs.device)
    copies = first_of(["num_return_sequences"], [kwargs, given, own, {"num_return_sequences": 1}])
    copies = integer(*copies.popitem(), least=1)
    if copies > 1:
        inputs = inputs.repeat_interleave(copies, 0)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(copies, 0)
        for name in OF_EACH_ROW & choices.keys():
            values = several(choices[name])
            if values is not None:
                choices[name] = [value for value in values for _ in range(copies)]
    check_scheduler(scheduler)
    settings = settings_of([kwargs, given], scheduler)
    call = DecodingCall.of(model, scheduler, len(inputs), **choices, **settings)
    stream = None
    if streamer is not None:
        if call.infill:
            raise ValueError(
                "`streamer` is told what follows a prompt, which `infill` has not: leave it out."
            )
        if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"`streamer` must have `put` and `end`, got {shown(streamer)}.")
        stream = BlockStream(streamer, inputs, model.config.mask_token_id, call, on_step)
    output = denoise(model, call, inputs, attention_mask, on_step=stream or on_step)
    if stream is not None:
        stream.finish(output.sequences)
    if not call.infill:
        return torch.cat((inputs, output.sequences), dim=1)
    given = torch.ones_like(inputs) if attention_mask is None else attention_mask
    number = torch.arange(output.sequences.shape[1], device=inputs.device)
    packed = number < given.sum(-1, keepdim=True)
    return inputs.masked_scatter(given.bool(), output.sequences[packed])


def _check_names(*sources: dict[str, Any]) -> None:
    """Raises for what the call, the first of the sources, or a configuration asks in vain."""
    parameters = inspect.signature(GenerationMixin.generate).parameters
    known_elsewhere = {*vars(GenerationConfig()), *parameters}
    for source in sources:
        for name, value in source.items():
            if name in (*CONFIGURABLE, *WITHOUT_EFFECT) or name.startswith("_"):
                continue
            if name in known_elsewhere and not _is_off(name, value):
                raise ValueError(
                    f"`{name}={shown(value)}` asks for something that decoding by diffusion has "
                    f"not: leave it out; what can be set is {', '.join(CONFIGURABLE)}."
                )
            if name not in known_elsewhere and source is sources[0]:
                raise TypeError(
                    f"`{name}` is not an argument of `generate`: use {', '.join(CONFIGURABLE)}."
                )


def _is_off(name: str, value: Any) -> bool:
    """Whether a value asks for nothing, as `num_beams=1` or `length_penalty=0.0`."""
    value = plain(value)
    if value is None or value is False:
        return True
    off = () if name.endswith("_token_id") else (0, 1) if name in OFF_AT_ONE else (0,)
    return type(value) in (int, float) and value in off
