"""The choices of one call of the denoising loop: checked once, fixed, and passed on with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import LogitsProcessor, LogitsProcessorList

from ..checks.arguments import (
    LARGEST_FACTOR,
    check_callable,
    choice,
    flag,
    generators,
    integer,
    number,
    several,
    shown,
    token_id,
)
from ..circuits.random import Generators
from ..configuration_codd import CoDDConfig
from ..coupling.heads import CallHead, HeadName
from ..coupling.windows import CoupledBackbone
from ..schedulers.scheduling_codd import MOST_STEPS, CoDDScheduler

ForcedTokens = Mapping[int, int] | Sequence[Mapping[int, int]]
"""Tokens by their place among the generated ones, for all rows or for each."""

PerRow = int | Sequence[int]
"""A number for all rows, or one for each."""

PARADIGMS = ("block", "full")
CACHES = (None, "prefix", "dual")
DEFAULT_LENGTH = 128
DEFAULT_BLOCK_LENGTH = 32


@dataclass(frozen=True)
class DecodingCall:
    """The choices of a call, as `of` takes and checks them; lists have an entry for each row.

    Attributes:
        scheduler: of this call alone, with its settings and the mask token.
        block_length: None in the full paradigm, which has no block order.
        behind: the token behind the end of a text.
    """

    head: CallHead
    scheduler: CoDDScheduler
    generator: Generators
    mask_token_id: int
    gen_length: list[int]
    block_length: int | None
    num_inference_steps: list[int | None]
    infill: bool
    min_new_tokens: list[int]
    forced_tokens: list[dict[int, int]]
    eos_token_id: list[int]
    behind: int
    logits_processor: LogitsProcessor | LogitsProcessorList | None
    cache: str | None
    guidance_scale: list[float]

    @classmethod
    def of(
        cls,
        model: CoupledBackbone,
        scheduler: CoDDScheduler,
        batch: int,
        *,
        gen_length: PerRow | None = None,
        block_length: int | None = None,
        num_inference_steps: PerRow | None = None,
        paradigm: str = "block",
        infill: bool = False,
        generator: Generators = None,
        eos_token_id: Sequence[int] = (),
        pad_token_id: int | None = None,
        min_new_tokens: PerRow | None = None,
        forced_tokens: ForcedTokens | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        cache: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        head: HeadName = None,
        **settings: Any,
    ) -> DecodingCall:
        """Checks the arguments of a call on `batch` rows.

        Args:
            model: the backbone, with or without a head.
            scheduler: its settings count where the call has none.
            batch: the number of rows.
            gen_length: number of tokens to generate; without effect on `infill`.
            block_length: tokens in a block (fewer in the last one); default 32, or the blocks of a
                block-causal backbone. Those are counted from the beginning of the row, as its
                attention counts them, and `block_length` divides its own.
            num_inference_steps: the most passes of the backbone for the whole generation, shared
                evenly by a row's blocks that hold masks, the remainder by the first ones; default
                one for four tokens. Steps that a block does not need are not run.
            paradigm: `block`, or `full` for no block order.
            infill: whether rows are templates, in which every mask token is a position to fill. No
                end-of-text or padding token is drawn there.
            generator: one for all rows, or a list with one per row: a row's tokens then do not
                depend on the rest of the batch.
            eos_token_id: the end-of-text token, or several. Nothing is decoded behind one: once all
                before it is decided, the rest becomes padding, and the row costs no more passes.
            pad_token_id: the token behind it; default the model's, or else the first end-of-text
                one.
            min_new_tokens: how many generated tokens come before the first end-of-text token. The
                backbone's prediction rules it out before the circuit sees it.
            forced_tokens: tokens by their place among the generated ones (from 0). They stand on
                the canvas from the start, and are never remasked.
            logits_processor: transformers' processors of the scores that candidates are drawn from;
                `CoDDScheduler.step` says what they see.
            cache: `"prefix"` or `"dual"`: after the first step of a block (or of the whole, in the
                full paradigm) the backbone computes only the block and what follows it, or only the
                block, and reuses the keys and values of the rest: an approximation, for decoders
                that transformers runs.
            guidance_scale: strength of classifier-free guidance as LLaDA counts it: 0 or None is
                off, and `s` here is `s + 1` for those of transformers' and diffusers' models whose
                scale 1 is off. A guided pass is one over twice the rows.
            head: the name of the head that couples this call; None, the default one; False, none.
            **settings: the scheduler's settings for this call (`strategy`, `sampling`, ...).

        `gen_length`, `num_inference_steps`, `min_new_tokens`, `forced_tokens` and `guidance_scale`
        hold for all rows, or are lists with an entry for each.

        Raises:
            ValueError: a number is out of range, a list has not one entry for each row, a token or
                a place does not exist, or arguments or the backbone's attention do not go together.
            TypeError: an argument is of another kind, or unknown.
        """
        config = model.config
        mask_token_id = token_id("mask_token_id", model.mask_token_id, config.vocab_size)
        check_scheduler(scheduler)
        processor = "transformers' processors, or a function of ids and scores"
        check_callable("logits_processor", logits_processor, processor)
        generators("generator", generator, batch)
        choice("paradigm", paradigm, PARADIGMS)
        choice("cache", cache, CACHES)
        infill = flag("infill", infill)

        def of_rows(name: str, value: Any, default: Any, check: Callable[[str, Any], Any]) -> list:
            entries = several(value)
            entries = [value] * batch if entries is None else entries
            if len(entries) != batch:
                raise ValueError(
                    f"`{name}` must have one entry per prompt ({batch}), got {len(entries)}."
                )
            return [default if entry is None else check(name, entry) for entry in entries]

        length = partial(integer, least=1, most=MOST_STEPS)
        lengths = of_rows("gen_length", gen_length, DEFAULT_LENGTH, length)
        steps = of_rows("num_inference_steps", num_inference_steps, None, length)
        least = of_rows("min_new_tokens", min_new_tokens, 0, partial(integer, least=0))
        forced = of_rows("forced_tokens", forced_tokens, {}, partial(_forced, config))
        scales = of_rows("guidance_scale", guidance_scale, 0.0, _scale)
        if infill and (any(least) or any(forced)):
            raise ValueError(
                "`min_new_tokens` and `forced_tokens` are for text after a prompt: leave them out "
                "with `infill`, and write what is given into the template."
            )
        for most, number_before_end, tokens in zip(lengths, least, forced, strict=True):
            if number_before_end > most or not all(0 <= place < most for place in tokens):
                name = "min_new_tokens" if number_before_end > most else "forced_tokens"
                what = "be at most" if number_before_end > most else "have places below"
                found = number_before_end if number_before_end > most else [*tokens]
                raise ValueError(f"`{name}` must {what} `gen_length` ({most}), got {found}.")
        if mask_token_id in eos_token_id:
            raise ValueError(
                f"`eos_token_id` must not hold the mask token ({mask_token_id}), which stands "
                "wherever nothing is decoded yet: give the tokens that end a text."
            )
        # As in transformers, an end token stands for padding where there is none.
        padding = (pad_token_id, config.pad_token_id, *eos_token_id[:1])
        behind = next((t for t in padding if t not in (None, mask_token_id)), mask_token_id)
        scheduler = scheduler.for_call(mask_token_id, **settings)
        scheduler.settings.check_vocabulary(config.vocab_size)
        return cls(
            head=model.heads.of_call(head),
            scheduler=scheduler,
            generator=generator,
            mask_token_id=mask_token_id,
            gen_length=lengths,
            block_length=_block_length(config, paradigm, block_length),
            num_inference_steps=steps,
            infill=infill,
            min_new_tokens=least,
            forced_tokens=forced,
            eos_token_id=list(eos_token_id),
            behind=behind,
            logits_processor=logits_processor,
            cache=cache,
            guidance_scale=scales,
        )


CHOICES = tuple(
    name
    for name, parameter in inspect.signature(DecodingCall.of).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
"""The arguments of a call but for its draw settings."""


def check_scheduler(scheduler: Any) -> None:
    """Raises a TypeError for anything but a scheduler of ours."""
    if not isinstance(scheduler, CoDDScheduler):
        raise TypeError(f"`scheduler` must be a CoDDScheduler, got {shown(scheduler)}.")


def _block_length(config: CoDDConfig, paradigm: str, block_length: int | None) -> int | None:
    """A block-causal backbone sees nothing beyond a block: positions must be filled in order."""
    attended = getattr(config.text_config, "block_length", None)
    if block_length is None:
        block_length = attended or DEFAULT_BLOCK_LENGTH
    block_length = integer("block_length", block_length, least=1)
    if attended is not None and paradigm == "full":
        raise ValueError(
            f"`paradigm` must be 'block' for a backbone with block-causal attention (blocks of "
            f"{attended}), got {paradigm!r}."
        )
    if attended is not None and attended % block_length:
        raise ValueError(
            f"`block_length` must divide the backbone's blocks of {attended} tokens, beyond which "
            f"it sees nothing, got {block_length}: give {attended}."
        )
    return None if paradigm == "full" else block_length


def _scale(name: str, value: Any) -> float:
    return float(number(name, value, 0, LARGEST_FACTOR))


def _forced(config: CoDDConfig, name: str, tokens: Any) -> dict[int, int]:
    if not isinstance(tokens, Mapping):
        raise TypeError(f"`{name}` must map places to token ids, got {shown(tokens)}.")
    forced = {}
    for place, token in tokens.items():
        forced[integer(name, place)] = token_id(name, token, config.vocab_size)
        if forced[place] == config.mask_token_id:
            raise ValueError(f"`{name}` must hold other tokens than the mask token, at {place}.")
    return forced
