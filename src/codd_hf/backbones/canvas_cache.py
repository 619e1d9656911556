"""Keys, values and hidden states of a canvas, kept between passes over parts of it.

With block-causal attention nothing in a block depends on what follows it: what is kept of complete
blocks is exact, and each is computed once after it is complete. With full attention everything at a
position depends on the whole canvas, so what is kept of one pass is not quite what the next would
compute. From step to step it changes little away from the positions that are being filled
(Fast-dLLM, arXiv 2505.22618): those are computed anew, at their places in the middle of the canvas,
and attend to what is kept of the others.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer


def cache_argument(module: nn.Module) -> str:
    """The name of a model's cache in transformers, as an argument and in outputs."""
    taken = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


class CanvasLayer(DynamicLayer):
    """One layer's keys and values, `[num_rows, heads, length, head_dim]`, overwritten at places."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache: CanvasCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers: keeps a pass's results; returns its rows' from the first column."""
        self.keys, keys = cache.write(self.keys, key_states, dim=2)
        self.values, values = cache.write(self.values, value_states, dim=2)
        self.is_initialized = True
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The canvas's length, whatever part of it a pass computes, and where it begins."""
        return self.get_seq_length() or query_length, 0


class CanvasCache(Cache):
    """A transformers cache of `num_rows` canvases of `length` columns, for passes over parts.

    Announce a pass with `begin`, run it by `BackboneFamily.states(..., cache=...)`.
    """

    def __init__(self, num_rows: int, length: int) -> None:
        super().__init__(layer_class_to_replicate=CanvasLayer)
        self.num_rows, self.length = num_rows, length
        self.hidden: torch.Tensor | None = None

    def begin(self, rows: torch.Tensor, columns: torch.Tensor, end: int) -> None:
        """Announces a pass over `columns` `[batch, n]`, below `end`, of `rows` `[batch]`.

        It sees what is kept below `end`, which a mask has to hide where nothing is kept yet.
        """
        self.rows, self.columns, self.end = rows, columns, end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers; called by the attention layers."""
        return super().update(key_states, value_states, layer_idx, self)

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """Keeps a pass's last hidden states; returns its rows', valid until the next pass."""
        self.hidden, hidden = self.write(self.hidden, hidden, dim=1)
        return hidden

    def write(
        self, stored: torch.Tensor | None, new: torch.Tensor, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`stored` with a pass's `new` on the canvas (dimension `dim`), and the pass's rows."""
        rows, columns = self.rows.to(new.device), self.columns.to(new.device)
        if stored is None:
            size = (self.num_rows, *new.shape[1:dim], self.length, *new.shape[dim + 1 :])
            stored = new.new_zeros(size)
        stored.transpose(1, dim)[rows[:, None], columns] = new.transpose(1, dim)
        seen = stored.narrow(dim, 0, self.end)
        return stored, seen if len(rows) == self.num_rows else seen[rows]
