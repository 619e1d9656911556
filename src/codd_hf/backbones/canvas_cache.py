"""Keys, values and hidden states of a canvas, kept between passes over parts of it.

With full attention everything at a position depends on the whole canvas, so what is kept of one
pass is not quite what the next would compute. From step to step it changes little away from the
positions that are being filled (Fast-dLLM, arXiv 2505.22618): those are computed anew, at their own
places in the middle of the canvas, and attend to what is kept of the others.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer


def cache_argument(module: nn.Module) -> str:
    """What transformers calls a model's cache, as an argument and in outputs: newly `cache`."""
    taken = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


class Place(NamedTuple):
    """What a pass computes, and where it is kept.

    Attributes:
        slots: `[batch]`, the entries of the store that hold the pass's rows.
        size: how many entries the store has.
        positions: `[batch, n]`, columns of the canvas; None: all of them.
        run: the first and the last of them plus one, where they are the same run in all rows.
    """

    slots: torch.Tensor
    size: int
    positions: torch.Tensor | None = None
    run: tuple[int, int] | None = None

    def write(
        self, stored: torch.Tensor | None, new: torch.Tensor, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts `new` where it belongs.

        Args:
            stored: `[size, ..., length, ...]`, with the canvas along dimension `dim`; None before
                anything is kept.
            new: of the pass's rows and positions.
            dim: 1 or 2.

        Returns:
            What is stored now, and of it the pass's rows over the whole canvas.
        """
        slots = self.slots.to(new.device)
        if self.positions is None:
            if stored is None:
                return new, new
            if self.size > len(stored):
                more = stored.new_empty(self.size - len(stored), *stored.shape[1:])
                stored = torch.cat((stored, more))
            stored[slots] = new
            return stored, new
        # Rows leave the batch as they are completed; while none has, nothing is copied.
        complete = len(slots) == self.size
        if complete and self.run is not None:
            first, end = self.run
            stored.narrow(dim, first, end - first).copy_(new)
            return stored, stored
        by_position = stored.transpose(1, dim)
        by_position[slots[:, None], self.positions.to(new.device)] = new.transpose(1, dim)
        return stored, stored if complete else stored[slots]


class CanvasLayer(DynamicLayer):
    """One layer's keys and values, `[size, heads, length, head_dim]`, overwritten at places."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps what a pass computed; returns its rows' keys and values over the whole canvas."""
        self.keys, keys = place.write(self.keys, key_states, dim=2)
        self.values, values = place.write(self.values, value_states, dim=2)
        self.is_initialized = True
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The canvas's length, whatever part of it a pass computes, and where it begins."""
        return self.get_seq_length() or query_length, 0


class CanvasCache(Cache):
    """A transformers cache of whole canvases, for passes over all of them or parts.

    Announce a pass with `whole` or `part`, run it by `BackboneFamily.states(..., cache=...)`.

    Args:
        num_rows: rows that there can be.
        device: where tokens are.
    """

    def __init__(self, num_rows: int, device: torch.device):
        super().__init__(layer_class_to_replicate=CanvasLayer)
        self.slots = torch.full((num_rows,), -1, device=device)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.slots.fill_(-1)
        self.hidden: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.place: Place | None = None

    @property
    def positions(self) -> torch.Tensor | None:
        """`[batch, n]`, the columns that the announced pass computes; None: all of them."""
        return self.place.positions

    def outdated(
        self, rows: torch.Tensor, tokens: torch.Tensor, read_again: torch.Tensor
    ) -> torch.Tensor:
        """`[batch]` bool: rows of which nothing is kept, or whose kept part has other tokens now.

        Args:
            rows: `[batch]`, the numbers of the rows.
            tokens: `[batch, length]`.
            read_again: `[batch, length]` bool, the columns that every pass computes.
        """
        slots = self.slots[rows]
        if self.tokens is None:
            return slots < 0
        changed = (self.tokens[slots] != tokens) & ~read_again
        return (slots < 0) | changed.any(-1)

    def whole(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Announces a pass over whole rows, of `tokens` `[batch, length]`."""
        unknown = rows[self.slots[rows] < 0]
        size = 0 if self.tokens is None else len(self.tokens)
        self.slots[unknown] = torch.arange(size, size + len(unknown), device=rows.device)
        self.place = Place(self.slots[rows], size + len(unknown))
        self.tokens, _ = self.place.write(self.tokens, tokens.clone(), dim=1)

    def part(
        self, rows: torch.Tensor, positions: torch.Tensor, run: tuple[int, int] | None = None
    ) -> None:
        """Announces a pass over columns `positions` `[batch, n]` of rows that are kept.

        Args:
            rows: `[batch]`, their numbers.
            positions: the columns.
            run: as in `Place`, if it is known.
        """
        self.place = Place(self.slots[rows], len(self.tokens), positions, run)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers; called by the attention layers."""
        return super().update(key_states, value_states, layer_idx, self.place)

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """Keeps a pass's last hidden states; returns its rows' over the whole canvas.

        The result is valid until the next pass, which writes to the same memory.
        """
        self.hidden, hidden = self.place.write(self.hidden, hidden, dim=1)
        return hidden
