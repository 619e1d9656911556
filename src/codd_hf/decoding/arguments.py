"""The arguments of the denoising loop, checked before anything expensive is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from ..checks.arguments import choice, flag, generators, integer, per_row, shown, token_id
from ..circuits.random import Generators
from ..configuration_codd import CoDDConfig
from ..schedulers import CoDDScheduler
from ..schedulers.scheduling_codd import MOST_STEPS

ForcedTokens = Mapping[int, int] | Sequence[Mapping[int, int]]
"""Tokens by their place among the generated ones, for all rows or for each."""

PerRow = int | Sequence[int]
"""A number for all rows, or one for each."""

PARADIGMS = ("block", "full")


@dataclass(frozen=True)
class DecodingArguments:
    """The checked arguments of a call, with an entry for each row where rows may differ.

    The fields are the arguments of `decoding.denoise` of these names.
    """

    gen_length: list[int]
    block_length: int
    num_inference_steps: list[int | None]
    paradigm: str
    infill: bool
    min_new_tokens: list[int]
    forced_tokens: Sequence[Mapping[int, int]]

    @classmethod
    def check(
        cls,
        scheduler: CoDDScheduler,
        config: CoDDConfig,
        batch: int,
        *,
        settings: dict[str, Any],
        gen_length: PerRow,
        block_length: int = 32,
        num_inference_steps: PerRow | None = None,
        paradigm: str = "block",
        infill: bool = False,
        min_new_tokens: PerRow | None = None,
        forced_tokens: ForcedTokens | None = None,
        generator: Generators = None,
    ) -> DecodingArguments:
        """Raises for what cannot be decoded.

        Raises:
            ValueError: a length or the number of steps is below 1 or above `MOST_STEPS`, a list has
                not one entry for each of the `batch` rows, a forced token or its place does not
                exist, arguments or the backbone's attention do not go together, or a setting is out
                of range.
            TypeError: a number is not an integer, or a setting is unknown.
        """
        check_scheduler(scheduler)
        if config.mask_token_id is None:
            raise ValueError("`mask_token_id` is not known: give it to `from_backbone`.")
        token_id("mask_token_id", config.mask_token_id, config.vocab_size)
        choice("paradigm", paradigm, PARADIGMS)
        at_least_1 = partial(integer, least=1, most=MOST_STEPS)
        at_least_0 = partial(integer, least=0)
        lengths = per_row("gen_length", gen_length, batch, at_least_1)
        block_length = integer("block_length", block_length, least=1)
        steps = per_row(
            "num_inference_steps",
            num_inference_steps,
            batch,
            lambda name, value: None if value is None else at_least_1(name, value),
        )
        fewest = 0 if min_new_tokens is None else min_new_tokens
        fewest = per_row("min_new_tokens", fewest, batch, at_least_0)
        infill = flag("infill", infill)
        _check_attention(config.text_config, paradigm, block_length)
        generators("generator", generator, batch)
        forced = per_row(
            "forced_tokens",
            {} if forced_tokens is None else forced_tokens,
            batch,
            partial(_forced, config),
        )
        if infill and (any(fewest) or any(forced)):
            name = "forced_tokens" if any(forced) else "min_new_tokens"
            raise ValueError(
                f"`{name}` is for text after a prompt, not for `infill`: leave it out and write "
                "what is given into the template."
            )
        for number, length in zip(fewest, lengths, strict=True):
            if number > length:
                raise ValueError(
                    f"`min_new_tokens` must be at most `gen_length` ({length}), got {number}."
                )
        for tokens, length in zip(forced, lengths, strict=True):
            for place in tokens:
                if not 0 <= place < length:
                    raise ValueError(
                        f"`forced_tokens` must have places below `gen_length` ({length}), got "
                        f"{place}."
                    )
        scheduler.draw_settings(**settings).check_vocabulary(config.vocab_size)
        return cls(
            lengths,
            block_length,
            steps,
            paradigm,
            infill,
            fewest,
            forced,
        )


def check_scheduler(scheduler: Any) -> None:
    """Raises a TypeError for what is no scheduler of ours."""
    if not isinstance(scheduler, CoDDScheduler):
        raise TypeError(f"`scheduler` must be a CoDDScheduler, got {shown(scheduler)}.")


def _check_attention(config: PretrainedConfig, paradigm: str, block_length: int) -> None:
    """A block-causal backbone sees nothing beyond a block: positions must be filled in order."""
    attended = getattr(config, "block_length", None)
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
