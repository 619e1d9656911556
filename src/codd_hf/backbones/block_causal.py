"""Block-causal attention, which block-diffusion models (BD3-LM, SDAR, LLaDA2) are trained with.

Token `i` of a sequence belongs to block `i // block_length`. A position sees its own block, both
ways, and all earlier blocks. One pass over a sequence then gives what decoding block by block on a
cache gives. Blocks are counted from a row's first real token, as in those models' own code; where
the blocks of decoding begin does not matter to attention.
"""

from __future__ import annotations

import torch


def block_causal_mask(
    attention_mask: torch.Tensor, block_length: int, dtype: torch.dtype
) -> torch.Tensor:
    """An additive attention mask that is block-causal over the real tokens of each row.

    Args:
        attention_mask: `[batch, length]`, 0 at padding. Blocks are counted over real tokens.
        block_length: tokens in a block.
        dtype: of the result; the model's.

    Returns:
        `[batch, 1, length, length]`, query by key: 0 where a query sees a key, else the lowest
        number of `dtype`. Padding is seen by itself alone, so that no row of scores is empty.

    Raises:
        ValueError: `block_length` is not a positive integer.
    """
    if not isinstance(block_length, int) or block_length < 1:
        raise ValueError(f"`block_length` must be a positive integer, got {block_length!r}.")
    real = attention_mask.bool()
    block = (real.long().cumsum(1) - 1).div(block_length, rounding_mode="floor")
    sees = (block[:, :, None] >= block[:, None, :]) & real[:, None, :] & real[:, :, None]
    sees = sees | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    hidden = torch.zeros(sees.shape, dtype=dtype, device=real.device)
    return hidden.masked_fill(~sees, torch.finfo(dtype).min)[:, None]
