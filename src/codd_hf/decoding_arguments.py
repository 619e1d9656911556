"""The arguments of the denoising loop, checked before anything expensive is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .circuits.random import Generators
from .configuration_codd import CoDDConfig
from .schedulers import CoDDScheduler

ForcedTokens = Mapping[int, int] | Sequence[Mapping[int, int]]
"""Tokens by their place among the generated ones, for all rows or for each."""

PerRow = int | Sequence[int]
"""A number for all rows, or one for each."""

CHOICES = {"paradigm": ("block", "full"), "windowing": ("aligned", "centred")}


@dataclass(frozen=True)
class DecodingArguments:
    """The checked arguments of a call, with an entry for each row where rows may differ.

    The fields are the arguments of `decoding.denoise` of these names.
    """

    gen_length: list[int]
    block_length: int
    num_inference_steps: list[int] | None
    paradigm: str
    windowing: str
    infill: bool
    free_length: bool
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
        windowing: str = "aligned",
        infill: bool = False,
        free_length: bool = False,
        min_new_tokens: PerRow | None = None,
        forced_tokens: ForcedTokens | None = None,
        generator: Generators = None,
    ) -> DecodingArguments:
        """Raises for what cannot be decoded.

        Raises:
            ValueError: a length or the number of steps is below 1, a list has not one entry for
                each of the `batch` rows, a forced token or its place does not exist, arguments or
                the backbone's attention do not go together, or a setting is out of range.
            TypeError: a number is not an integer, or a setting is unknown.
        """
        for name, value in (("paradigm", paradigm), ("windowing", windowing)):
            if value not in CHOICES[name]:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(CHOICES[name])}, got {value!r}."
                )
        lengths = _per_row("gen_length", gen_length, batch, 1)
        _check_integer("block_length", block_length, 1)
        steps = num_inference_steps
        if steps is not None:
            steps = _per_row("num_inference_steps", steps, batch, 1)
        fewest = _per_row("min_new_tokens", min_new_tokens or 0, batch, 0)
        _check_attention(config.text_config, paradigm, block_length)
        _check_entries("generator", generator, batch)
        _check_entries("forced_tokens", forced_tokens, batch)
        if infill and (any(fewest) or forced_tokens):
            name = "forced_tokens" if forced_tokens else "min_new_tokens"
            raise ValueError(
                f"`{name}` is for text after a prompt, not for `infill`: leave it out and write "
                "what is given into the template."
            )
        if free_length and not infill:
            raise ValueError("`free_length` is about the gaps of `infill`: give both or neither.")
        for number, length in zip(fewest, lengths, strict=True):
            if number > length:
                raise ValueError(
                    f"`min_new_tokens` must be at most `gen_length` ({length}), got {number}."
                )
        forced = forced_tokens or {}
        forced = [forced] * batch if isinstance(forced, Mapping) else forced
        for tokens, length in zip(forced, lengths, strict=True):
            for place, token in tokens.items():
                if not 0 <= place < length:
                    raise ValueError(
                        f"`forced_tokens` must have places below `gen_length` ({length}), got "
                        f"{place}."
                    )
                if not 0 <= token < config.vocab_size or token == config.mask_token_id:
                    raise ValueError(
                        f"`forced_tokens` must hold token ids below {config.vocab_size} other than "
                        f"the mask token, got {token} at {place}."
                    )
        scheduler.draw_settings(**settings)
        return cls(
            lengths,
            block_length,
            steps,
            paradigm,
            windowing,
            infill,
            free_length,
            fewest,
            forced,
        )


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


def _per_row(name: str, value: PerRow, batch: int, least: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    _check_entries(name, values, batch)
    values = values if isinstance(values, list) else [values] * batch
    for number in values:
        _check_integer(name, number, least)
    return values


def _check_entries(name: str, value: Any, batch: int) -> None:
    if isinstance(value, Sequence) and len(value) != batch:
        raise ValueError(f"`{name}` must have one entry per prompt ({batch}), got {len(value)}.")


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
