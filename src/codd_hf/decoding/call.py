"""The choices of one call of the denoising loop: checked once, fixed, and passed on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    list_of_ids,
    number,
    per_row,
    shown,
    token_id,
)
from ..circuits.random import Generators
from ..configuration_codd import CoDDConfig
from ..coupling.heads import CallHead, HeadName
from ..coupling.windows import CoupledBackbone
from ..schedulers import CoDDScheduler
from ..schedulers.scheduling_codd import MOST_STEPS, PROCESSOR
from ..schedulers.settings import DrawSettings

ForcedTokens = Mapping[int, int] | Sequence[Mapping[int, int]]
"""Tokens by their place among the generated ones, for all rows or for each."""

PerRow = int | Sequence[int]
"""A number for all rows, or one for each."""

PARADIGMS = ("block", "full")
CACHES = (None, "prefix", "dual")


@dataclass(frozen=True)
class DecodingCall:
    """The choices of a call, checked by `of`; lists have an entry for each row.

    The fields are the arguments of `of`, and besides

    Attributes:
        scheduler: of the call, or of many: a step leaves nothing there.
        settings: of every draw.
        block_length: None in the full paradigm, which has no block order.
        end_ids: the tokens that end a text; in a gap of a template none of them is drawn.
        behind: the token behind the end of a text.
    """

    head: CallHead
    scheduler: CoDDScheduler
    settings: DrawSettings
    generator: Generators
    gen_length: list[int]
    block_length: int | None
    num_inference_steps: list[int | None]
    infill: bool
    min_new_tokens: list[int]
    forced_tokens: list[dict[int, int]]
    end_ids: list[int]
    behind: int
    early_stop: bool
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
        gen_length: PerRow,
        block_length: int = 32,
        num_inference_steps: PerRow | None = None,
        paradigm: str = "block",
        infill: bool = False,
        generator: Generators = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        early_stop: bool = True,
        min_new_tokens: PerRow | None = None,
        forced_tokens: ForcedTokens | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        cache: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        head: HeadName | CallHead = None,
        **settings: Any,
    ) -> DecodingCall:
        """Checks the arguments of a call on `batch` rows.

        Args:
            model: the backbone, with or without a head.
            scheduler: its settings count where the call has none.
            batch: the number of rows.
            gen_length: number of tokens to generate in each row, or one number for each; without
                effect on `infill`.
            block_length: tokens in a block (fewer in the last one). The blocks of a block-causal
                backbone are counted from the beginning of the row, as its attention counts them, so
                that the first one may be shorter; `block_length` divides its own.
            num_inference_steps: the most passes of the backbone for the whole generation, for all
                rows or for each, shared evenly by a row's blocks that hold masks, the remainder by
                the first ones. Steps that a block does not need are not run.
            paradigm: `block`, or `full` for no block order.
            infill: whether rows are templates, in which every mask token is a position to fill. No
                end-of-text or padding token is drawn there.
            generator: one for all rows, or a list with one per row: a row's tokens then do not
                depend on the rest of the batch.
            eos_token_id: the end-of-text token, or several.
            pad_token_id: the token behind it; default the model's, or else the first end-of-text
                one.
            early_stop: whether nothing more is decoded behind an end-of-text token: once all before
                it is decided, the rest becomes padding, and the row costs no more passes.
            min_new_tokens: how many generated tokens come before the first end-of-text token, for
                all rows or one number for each; `gen_length` means that there is none. The
                backbone's prediction rules it out before the circuit sees it.
            forced_tokens: tokens by their place among the generated ones (from 0), for all rows or
                one mapping for each. They stand on the canvas from the start, so that everything
                else is predicted given them, and are never remasked.
            logits_processor: transformers' processors of the scores that candidates are drawn from;
                `CoDDScheduler.step` says what they see.
            cache: `"prefix"` or `"dual"`: after the first step of a block (or of the whole, in the
                full paradigm) the backbone computes only the block and what follows it, or only the
                block, and reuses the keys and values of the rest; see `reader`. An approximation,
                for decoders that transformers runs. A pass over a part counts as one pass.
            guidance_scale: strength of classifier-free guidance, for all rows or for each, as LLaDA
                counts it: 0 or None is off, and `s` here is `s + 1` for those of transformers' and
                diffusers' models whose scale 1 is off. A guided pass is one over twice the rows.
            head: the name of the head that couples this call; None, the default one; False, none.
            **settings: the scheduler's settings for this call (`strategy`, `sampling`, ...).

        Raises:
            ValueError: a number is out of range, a list has not one entry for each row, a token or
                a place does not exist, or arguments or the backbone's attention do not go together.
            TypeError: an argument is of another kind, or unknown.
        """
        config = model.config
        mask_token_id = token_id("mask_token_id", model.mask_token_id, config.vocab_size)
        check_scheduler(scheduler)
        check_callable("logits_processor", logits_processor, PROCESSOR)
        generators("generator", generator, batch)
        choice("paradigm", paradigm, PARADIGMS)
        choice("cache", cache, CACHES)
        block_length = integer("block_length", block_length, least=1)
        _check_attention(config, paradigm, block_length)
        infill = flag("infill", infill)
        of_rows = {
            name: per_row(name, default if value is None else value, batch, check)
            for name, value, default, check in (
                ("gen_length", gen_length, None, _at_least_1),
                ("num_inference_steps", num_inference_steps, None, _steps),
                ("min_new_tokens", min_new_tokens, 0, partial(integer, least=0)),
                ("forced_tokens", forced_tokens, {}, partial(_forced, config)),
                ("guidance_scale", guidance_scale, 0.0, _scale),
            )
        }
        for name in ("forced_tokens", "min_new_tokens"):
            if infill and any(of_rows[name]):
                raise ValueError(
                    f"`{name}` is for text after a prompt, not for `infill`: leave it out and "
                    "write what is given into the template."
                )
        for row, length in enumerate(of_rows["gen_length"]):
            if (least := of_rows["min_new_tokens"][row]) > length:
                raise ValueError(
                    f"`min_new_tokens` must be at most `gen_length` ({length}), got {least}."
                )
            for place in of_rows["forced_tokens"][row]:
                if not 0 <= place < length:
                    raise ValueError(
                        f"`forced_tokens` must have places below `gen_length` ({length}), got "
                        f"{place}."
                    )
        ends = list_of_ids("eos_token_id", eos_token_id, config.vocab_size)
        if mask_token_id in ends:
            raise ValueError(
                f"`eos_token_id` must not hold the mask token ({mask_token_id}), which stands "
                "wherever nothing is decoded yet: give the tokens that end a text."
            )
        # As in transformers, an end token stands for padding where there is none.
        padding = (pad_token_id, config.pad_token_id, *ends[:1])
        behind = next((t for t in padding if t not in (None, mask_token_id)), mask_token_id)
        if infill and config.pad_token_id is not None:
            ends = [*ends, config.pad_token_id]
        draws = scheduler.draw_settings(**settings)
        draws.check_vocabulary(config.vocab_size)
        return cls(
            head=model.heads.of_call(head),
            scheduler=scheduler,
            settings=draws,
            generator=generator,
            block_length=None if paradigm == "full" else block_length,
            infill=infill,
            end_ids=ends,
            behind=behind,
            early_stop=flag("early_stop", early_stop),
            logits_processor=logits_processor,
            cache=cache,
            **of_rows,
        )


def check_scheduler(scheduler: Any) -> None:
    """Raises a TypeError for anything but a scheduler of ours."""
    if not isinstance(scheduler, CoDDScheduler):
        raise TypeError(f"`scheduler` must be a CoDDScheduler, got {shown(scheduler)}.")


def _check_attention(config: CoDDConfig, paradigm: str, block_length: int) -> None:
    """A block-causal backbone sees nothing beyond a block: positions must be filled in order."""
    attended = getattr(config.text_config, "block_length", None)
    if attended is None:
        return
    if paradigm == "full":
        raise ValueError(
            f"`paradigm` must be 'block' for a backbone with block-causal attention (blocks of "
            f"{attended}), got {paradigm!r}."
        )
    if attended % block_length:
        raise ValueError(
            f"`block_length` must divide the backbone's blocks of {attended} tokens, beyond which "
            f"it sees nothing, got {block_length}: give {attended}."
        )


def _at_least_1(name: str, value: Any) -> int:
    return integer(name, value, least=1, most=MOST_STEPS)


def _steps(name: str, value: Any) -> int | None:
    return None if value is None else _at_least_1(name, value)


def _scale(name: str, value: Any) -> float:
    return float(number(name, value, 0, LARGEST_FACTOR))


def _forced(config: CoDDConfig, name: str, tokens: Any) -> dict[int, int]:
    if not isinstance(tokens, Mapping):
        raise TypeError(f"`{name}` must map places to token ids, got {shown(tokens)}.")
    forced = {}
    for place, token in tokens.items():
        token = token_id(name, token, config.vocab_size)
        if token == config.mask_token_id:
            raise ValueError(
                f"`{name}` must hold token ids other than the mask token, got {token} at {place}."
            )
        forced[integer(name, place)] = token
    return forced
