"""Tensors of a batch that are known together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Batched:
    """Fields that are tensors `[*batch, ...]`, and others that all of the batch shares."""

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor)}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self._tensors.values())).device

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with every tensor changed."""
        changed: dict[str, Any] = {name: change(t) for name, t in self._tensors.items()}
        return replace(self, **changed)

    def __getitem__(self, index: Any) -> Self:
        """What concerns some places of the batch, such as `prediction[rows, positions]`."""
        return self.map(lambda tensor: tensor[index])
