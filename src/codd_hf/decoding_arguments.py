"""The arguments of the denoising loop, checked before anything expensive is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .circuits.random import Generators
from .configuration_codd import CoDDConfig
from .schedulers import CoDDScheduler

ForcedTokens = Mapping[int, int] | Sequence[Mapping[int, int]]
"""Tokens by their place among the generated ones, for all rows or for each."""


def check_decoding_arguments(
    scheduler: CoDDScheduler,
    batch: int,
    gen_length: int,
    block_length: int,
    num_inference_steps: int,
    generator: Generators,
    settings: dict[str, Any],
    min_new_tokens: int | Sequence[int] | None,
    forced_tokens: ForcedTokens | None,
    config: CoDDConfig,
) -> None:
    """Raises for what cannot be decoded.

    Raises:
        ValueError: a length or the number of steps is below 1, there are fewer steps than blocks,
            a list has not one entry for each of the `batch` rows, a forced token or its place does
            not exist, or a setting is out of range.
        TypeError: a number is not an integer, or a setting is unknown.
    """
    _check_integer("gen_length", gen_length, 1)
    _check_integer("block_length", block_length, 1)
    _check_integer("num_inference_steps", num_inference_steps, 1)
    num_blocks = -(-gen_length // block_length)
    if num_inference_steps < num_blocks:
        raise ValueError(
            f"`num_inference_steps` must be at least the number of blocks, {num_blocks} for "
            f"`gen_length={gen_length}` and `block_length={block_length}`, got "
            f"{num_inference_steps}: take more steps or longer blocks."
        )
    if (
        generator is not None
        and not isinstance(generator, torch.Generator)
        and (len(generator) != batch)
    ):
        raise ValueError(
            f"`generator` must be one generator or a list with one per prompt ({batch}), got "
            f"{len(generator)}."
        )
    for name, value in (("min_new_tokens", min_new_tokens), ("forced_tokens", forced_tokens)):
        if isinstance(value, Sequence) and len(value) != batch:
            raise ValueError(
                f"`{name}` must have one entry per prompt ({batch}), got {len(value)}."
            )
    each = min_new_tokens if isinstance(min_new_tokens, Sequence) else [min_new_tokens or 0]
    for number in each:
        _check_integer("min_new_tokens", number, 0)
        if number > gen_length:
            raise ValueError(
                f"`min_new_tokens` must be at most `gen_length` ({gen_length}), got {number}."
            )
    for tokens in for_each_row(forced_tokens, batch):
        for place, token in tokens.items():
            if not 0 <= place < gen_length:
                raise ValueError(
                    f"`forced_tokens` must have places below `gen_length` ({gen_length}), got "
                    f"{place}."
                )
            if not 0 <= token < config.vocab_size or token == config.mask_token_id:
                raise ValueError(
                    f"`forced_tokens` must hold token ids below {config.vocab_size} other than the "
                    f"mask token, got {token} at {place}."
                )
    scheduler.draw_settings(**settings)


def for_each_row(forced_tokens: ForcedTokens | None, batch: int) -> Sequence[Mapping[int, int]]:
    """The forced tokens of each row."""
    if forced_tokens is None or isinstance(forced_tokens, Mapping):
        return [forced_tokens or {}] * batch
    return forced_tokens


def steps_per_block(num_inference_steps: int, gen_length: int, block_length: int) -> list[int]:
    """Shares the steps evenly over the blocks; the remainder goes to the first ones."""
    num_blocks = -(-gen_length // block_length)
    each, remainder = divmod(num_inference_steps, num_blocks)
    return [each + (block < remainder) for block in range(num_blocks)]


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
