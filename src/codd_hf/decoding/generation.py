"""`CoDDModel.generate`: the denoising loop under the names of transformers' `generate`."""

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from ..checks.arguments import check_known, integer, padding_mask, plain, shown, token_ids
from ..coupling.inputs import refuse_requests
from ..coupling.windows import CoupledBackbone
from ..schedulers.scheduling_codd import CoDDScheduler
from .call import CHOICES, DecodingCall
from .choices import SETTINGS, choices_of, entries, merged, settings_of
from .layout import lay_out
from .loop import OnStep, denoise
from .step import Canvas

KNOWN = (*CHOICES, *SETTINGS, "max_new_tokens", "max_length", "do_sample")
"""Arguments of a call or a generation configuration."""

WITHOUT_EFFECT = (
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "disable_compile",
    "tokenizer",
    "transformers_version",
)
"""Arguments that transformers' callers pass along and that change nothing here."""

OFF_AT_ONE = (
    "encoder_repetition_penalty",
    "guidance_scale",
    "length_penalty",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "top_h",
    "typical_p",
)
"""Arguments of transformers that decoding by diffusion has not, of which 1 asks for nothing."""


class BlockStream:
    """Shows the canvas of one generation to a streamer, by transformers' protocol.

    The streamer gets `put(prompts)`, after every step `put_draft(block)` with the block that is
    being filled, the mask token where nothing is committed yet, and `put(block)` once nothing in
    the block or before it changes any more, which the first step of the next block shows. All are
    token ids `[batch, n]` on the CPU. A streamer without `put_draft` (`TextStreamer`) hears of
    blocks only.
    """

    def __init__(self, streamer: BaseStreamer, prompts: torch.Tensor, canvas: Canvas) -> None:
        if canvas.call.infill:
            raise ValueError(
                "`streamer` is told what follows a prompt, which `infill` has not: leave it out."
            )
        if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"`streamer` must have `put` and `end`, got {shown(streamer)}.")
        self.streamer, self.canvas, self.tokens = streamer, canvas, canvas.result()[0]
        self.block_length = canvas.call.block_length or max(canvas.call.gen_length)
        self.block = 0  # the number of the block that is being filled
        streamer.put(prompts.cpu())

    def __call__(self) -> None:
        """Shows a step."""
        before, (self.tokens, _) = self.tokens, self.canvas.result()
        in_work = self.canvas.answers(self.canvas.is_noise(), False) | (self.tokens != before)
        if not in_work.any():  # in a pass that edits nothing
            return
        place = int(in_work.any(0).nonzero()[0])
        while self.block < place // self.block_length:
            self.finish_block()
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self._tokens_of_block())

    def finish_block(self) -> None:
        """Puts the block that is being filled."""
        self.streamer.put(self._tokens_of_block())
        self.block += 1

    def _tokens_of_block(self) -> torch.Tensor:
        start = self.block * self.block_length
        return self.tokens[:, start : start + self.block_length].cpu()


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

    `codd_hf.decoding.choices` says which source settles a choice. As in transformers,
    `do_sample=False` is temperature 0, at which nothing is drawn, and `do_sample=True` without a
    temperature is temperature 1.

    Args:
        model: the backbone, with or without a head.
        inputs: `[batch, prompt_length]`, padded on any side; with `infill`, templates with mask
            tokens where a token is to be found. Default, one prompt without a token.
        input_ids: another name of `inputs`.
        attention_mask: `[batch, prompt_length]`, 0 at padding; default, as in transformers, 0 at
            `pad_token_id`, unless that ends texts as well.
        generation_config: in place of further arguments.
        scheduler: default, one with the settings of `model.generation_config`.
        on_step: as for [`~codd_hf.decoding.loop.denoise`].
        streamer: as [`BlockStream`] serves it, for example `transformers.TextDiffusionStreamer`.
        **kwargs: `max_new_tokens` (or `gen_length`, or `max_length`), `do_sample`, those of
            [`~codd_hf.decoding.call.DecodingCall`] and the scheduler's settings
            ([`~codd_hf.schedulers.settings.DrawSettings`]).

    Returns:
        `[batch, prompt_length + n]`: the prompts as they were given, and the `n` tokens of the
        longest text after them, then padding. With `infill`, `[batch, length]`: the templates with
        their gaps filled.

    Raises:
        ValueError: an argument is out of range, or it asks for something that decoding by diffusion
            has not (`num_beams=4`).
        TypeError: an argument is not known.
    """
    # 1. The prompts.
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` are two names of one argument: give one.")
    inputs = input_ids if inputs is None else inputs
    if inputs is None:
        inputs = torch.empty(1, 0, dtype=torch.long, device=model.device)
    inputs = token_ids("inputs", inputs, model.config.vocab_size, model.device)
    refuse_requests({"token_type_ids": kwargs.pop("token_type_ids", None)})

    # 2. The choices of the call, and those that a configuration makes.
    if kwargs.get("do_sample") is True and plain(kwargs.get("temperature")) in (0,):
        raise ValueError("`do_sample=True` draws, and `temperature=0` does not: give one of them.")
    own, given = entries(model.generation_config), entries(generation_config)
    _check_names(kwargs, own | given | kwargs)
    asked, length = merged(given, kwargs), inputs.shape[1]
    if "max_length" in asked and "gen_length" not in asked:  # it counts the prompt
        kwargs["gen_length"] = integer("max_length", asked["max_length"], length + 1) - length
    scheduler = CoDDScheduler(**settings_of(own)) if scheduler is None else scheduler
    if not isinstance(scheduler, CoDDScheduler):
        raise TypeError(f"`scheduler` must be a CoDDScheduler, got {shown(scheduler)}.")
    temperature = {"temperature": scheduler.settings.temperature}
    choices = choices_of(model, temperature, given, kwargs)
    call = DecodingCall(model, scheduler, len(inputs), **choices)
    if attention_mask is None:
        special = choices.get("pad_token_id"), call.eos_token_id
        attention_mask = model.real_tokens(inputs, *special)
    if attention_mask is None:
        attention_mask = torch.ones_like(inputs)
    attention_mask = padding_mask("attention_mask", attention_mask, inputs.shape, inputs.device)

    # 3. The texts.
    canvas = lay_out(model, call, inputs, attention_mask)
    stream = None if streamer is None else BlockStream(streamer, inputs, canvas)
    denoise(model, canvas, on_step=on_step, after_step=stream)
    sequences, _ = canvas.result()
    if stream is not None:
        stream.finish_block()
        stream.streamer.end()
    if not call.infill:
        return torch.cat((inputs, sequences), dim=1)
    number = torch.arange(sequences.shape[1], device=inputs.device)
    packed = number < attention_mask.sum(-1, keepdim=True)
    return inputs.masked_scatter(attention_mask.bool(), sequences[packed])


def _check_names(call: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises for unknown names of a call, and for what it or a configuration asks in vain."""
    theirs = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    known = (*KNOWN, *WITHOUT_EFFECT)
    check_known(call, dict.fromkeys((*known, *theirs)), "an argument of `generate`")
    for name in asked.keys() & theirs - {*known}:
        nothing = [None, *[0] * (not name.endswith("_token_id")), *[1] * (name in OFF_AT_ONE)]
        if not name.startswith("_") and plain(asked[name]) not in nothing:
            raise ValueError(
                f"`{name}={shown(asked[name])}` asks for something that decoding by diffusion has "
                f"not: leave it out; what can be set is {', '.join(KNOWN)}."
            )
