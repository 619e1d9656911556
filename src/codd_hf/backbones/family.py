"""What CoDD needs to know of a family of diffusion language models.

A backbone is an ordinary `PreTrainedModel`. A family says how to build it so that every position
sees the whole sequence, and how to read from it, for position `i`, the logits of token `i` and the
hidden state that predicted them. Families are stateless; the model stays the user's own object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class BackboneStates:
    """One pass of a backbone over `[batch, length]` tokens.

    Attributes:
        last_hidden_state: `[batch, length, hidden]`; entry `i` is what predicts token `i`.
        read_logits: maps an index into the first two dimensions to logits, so that the output
            projection runs only where logits are wanted.
    """

    last_hidden_state: torch.Tensor
    read_logits: Callable[[tuple[torch.Tensor, ...] | None], torch.Tensor]

    def logits(self, index: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """Logits `[..., vocab]` at `index` (as in `x[index]`); by default of all positions."""
        return self.read_logits(index)


class BackboneFamily(ABC):
    """Builds and reads one family of backbones."""

    @abstractmethod
    def matches(self, config: PretrainedConfig) -> bool:
        """Whether a model with this configuration belongs to the family."""

    def adopt(self, config: PretrainedConfig) -> None:  # noqa: B027
        """Changes what must be changed in a configuration (or a loaded model's) to run in CoDD."""

    @abstractmethod
    def from_config(self, config: PretrainedConfig, **kwargs) -> PreTrainedModel:
        """A randomly initialised backbone."""

    @abstractmethod
    def from_pretrained(self, name_or_path: str, config: PretrainedConfig, **kwargs):
        """A pretrained backbone; `kwargs` go to transformers' `from_pretrained`."""

    @abstractmethod
    def states(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> BackboneStates:
        """Runs `model` on `[batch, length]` tokens with full attention over the unpadded ones."""
