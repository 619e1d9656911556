"""`CoDDModel.generate`: the denoising loop under the names of transformers' `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)

from ..checks.arguments import (
    check_callable,
    check_token_types,
    integer,
    padding_mask,
    plain,
    several,
    shown,
    token_ids,
)
from ..circuits.random import Generators
from ..schedulers import CoDDScheduler
from .arguments import ForcedTokens, check_scheduler
from .canvas import filler
from .generation_settings import (
    SETTINGS,
    TASK,
    entries,
    first_said,
    said_of_task,
    scheduler_of,
    settings_of_call,
    task_of_call,
)
from .loop import OnStep, denoise
from .streaming import BlockStream, DiffusionStreamer

if TYPE_CHECKING:
    from ..coupling.heads import HeadName
    from ..modeling_codd import CoDDModel

CONFIGURABLE = (*TASK, "do_sample", "num_return_sequences", *SETTINGS)
"""What a call or a generation configuration may say."""

WITHOUT_EFFECT = (
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "disable_compile",
    "transformers_version",
)
"""What transformers' callers pass along and what changes nothing here."""
OFF_AT_ONE = (
    "encoder_repetition_penalty",
    "guidance_scale",
    "length_penalty",
    "num_beam_groups",
    "num_beams",
    "top_h",
    "typical_p",
)
"""Of what transformers knows and decoding by diffusion has not: 1 asks for nothing."""


def generate(
    model: CoDDModel,
    inputs: torch.Tensor | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    scheduler: CoDDScheduler | None = None,
    generator: Generators = None,
    early_stop: bool = True,
    on_step: OnStep | None = None,
    streamer: DiffusionStreamer | None = None,
    forced_tokens: ForcedTokens | None = None,
    logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
    cache: str | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    head: HeadName = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Decodes by diffusion.

    The arguments from `max_new_tokens` on may stand in a generation configuration as well. What the
    call says comes first, then `generation_config`, then `model.generation_config`; of what shapes
    a draw, the scheduler's settings in place of the latter, if the call has one. Sampling is told
    as in transformers: `do_sample=False` is temperature 0, at which nothing is drawn, and
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
        generator: one for all rows, or a list with one per row.
        early_stop: as in `decoding.denoise`.
        on_step: as in `decoding.denoise`.
        streamer: hears the prompts, a draft after every step and the blocks as they are completed
            (see `streaming.BlockStream`), for example `transformers.TextDiffusionStreamer`, which
            takes one row.
        forced_tokens: as in `decoding.denoise`.
        logits_processor: as in `decoding.denoise`.
        cache: as in `decoding.denoise`; `use_cache`, which callers pass along, has no effect.
        guidance_scale: as in `decoding.denoise`. Not read from a generation configuration, where
            1 is off and 0 is not.
        head: the name of the head that couples this call; None, the model's default; False, none.
        **kwargs: `max_new_tokens` (or `gen_length`, default 128; or `max_length`, with the prompt),
            `block_length` (default 32, or the blocks of a block-causal backbone),
            `num_inference_steps` (passes of the backbone; default one for four tokens, and at least
            one per block), `paradigm`, `infill`, `do_sample`, `num_return_sequences`,
            `eos_token_id` (one or several) and `pad_token_id` (default the model's),
            `min_new_tokens`, and the scheduler's settings (`temperature`, `top_k`, `top_p`,
            `strategy`, `sampling`, `repetition_penalty`, ...). Lengths and steps are one number, or
            a list with one for each row.

    Returns:
        `[batch * num_return_sequences, prompt_length + n]`: the prompts as they were given, and
        what follows, `n` tokens in the longest row; what stands behind the end of a text is
        padding (`pad_token_id`), or the first end-of-text token of a model that has none. With
        `infill`, `[batch * num_return_sequences, length]`: the templates with their gaps filled.

    Raises:
        ValueError: an argument is out of range, or it asks for something that
            decoding by diffusion has not (`num_beams=4`).
        TypeError: an argument is not known.
    """
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` are two names of one argument: give one.")
    name = "inputs" if input_ids is None else "input_ids"
    inputs = input_ids if inputs is None else inputs
    if inputs is None:
        inputs = torch.empty(1, 0, dtype=torch.long, device=model.device)
    inputs = token_ids(name, inputs, model.config.vocab_size, model.device)
    check_token_types(kwargs.pop("token_type_ids", None), inputs)
    if not isinstance(generation_config, GenerationConfig | None):
        raise TypeError(
            f"`generation_config` must be a GenerationConfig, got {shown(generation_config)}."
        )
    head = model.head_of_call(head)
    given = {} if generation_config is None else entries(generation_config)
    own = entries(model.generation_config)
    _check_names(kwargs, given, own)
    draws, temperature = (plain(kwargs.get(name)) for name in ("do_sample", "temperature"))
    if draws is True and isinstance(temperature, (int, float)) and temperature == 0:
        raise ValueError(
            "`do_sample=True` draws, and `temperature=0` takes the most probable token: give one "
            "of them."
        )
    said = said_of_task(model, kwargs, given)
    task = task_of_call(said, model, inputs.shape[1])
    scheduler = scheduler_of(model.generation_config) if scheduler is None else scheduler
    check_scheduler(scheduler)
    settings = settings_of_call([kwargs, given], scheduler)
    if task["infill"] and streamer is not None:
        raise ValueError(
            "`streamer` is told what follows a prompt, which `infill` has not: leave it out."
        )
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"`streamer` must have `put` and `end`, got {shown(streamer)}.")
    check_callable("on_step", on_step, "a function of the step, its timestep and its state")
    if attention_mask is None:
        attention_mask = model.real_tokens(inputs, said["pad_token_id"], said["eos_token_id"])
    else:
        attention_mask = padding_mask("attention_mask", attention_mask, inputs.shape, inputs.device)
    copies = first_said(["num_return_sequences"], [kwargs, given, own])["num_return_sequences"]
    copies = 1 if copies is None else integer("num_return_sequences", copies, least=1)
    inputs = inputs.repeat_interleave(copies, 0)
    if attention_mask is not None:
        attention_mask = attention_mask.repeat_interleave(copies, 0)
    if streamer is not None:
        stream = BlockStream(
            streamer,
            model.config.mask_token_id,
            None if task["paradigm"] == "full" else integer("block_length", task["block_length"]),
            filler(model.config, task["eos_token_id"], task["pad_token_id"]),
        )
        stream.begin(inputs)
        on_step = stream.after(on_step)
    of_rows = {
        name: _of_copies(task.pop(name), copies)
        for name in ("gen_length", "num_inference_steps", "min_new_tokens")
    }
    output = denoise(
        model,
        scheduler,
        inputs,
        attention_mask,
        generator=generator,
        early_stop=early_stop,
        forced_tokens=_of_copies(forced_tokens, copies),
        logits_processor=logits_processor,
        cache=cache,
        guidance_scale=_of_copies(guidance_scale, copies),
        on_step=on_step,
        head=head,
        **of_rows,
        **task,
        **settings,
    )
    if streamer is not None:
        stream.finish(output.sequences)
    if not task["infill"]:
        return torch.cat((inputs, output.sequences), dim=1)
    given = torch.ones_like(inputs) if attention_mask is None else attention_mask
    number = torch.arange(output.sequences.shape[1], device=inputs.device)
    packed = number < given.bool().sum(-1, keepdim=True)
    return inputs.masked_scatter(given.bool(), output.sequences[packed])


def _of_copies(value: Any, copies: int) -> Any:
    """Of a list with an entry for each prompt, one with an entry for each copy of it."""
    values = several(value)
    return value if values is None else [v for v in values for _ in range(copies)]


def _check_names(*sources: dict[str, Any]) -> None:
    """Raises for what the call, the first of the sources, or a configuration asks in vain."""
    known_elsewhere = {*vars(GenerationConfig()), *_parameters_of(GenerationMixin.generate)}
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


def _parameters_of(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)
