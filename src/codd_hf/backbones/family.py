"""What CoDD needs to know of a family of diffusion language models.

A backbone is an ordinary `PreTrainedModel`. A family says how to build it so that every position
sees the whole sequence, and how to read from it, for position `i`, the logits of token `i` and the
hidden state that predicted them. Families are stateless; the model stays the user's own object.

Two fields of a backbone's configuration change how any family reads it:

- `block_length`: attention is block-causal in blocks of so many tokens (`block_causal.py`);
- `logit_shift`: what the model computes at a position predicts the next one (Dream).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .block_causal import block_causal_mask
from .canvas_cache import CanvasCache

Index = tuple[torch.Tensor, ...]


@dataclass
class BackboneStates:
    """One pass of a backbone over `[batch, length]` tokens.

    Attributes:
        last_hidden_state: `[batch, length, hidden]`; entry `i` is what predicts token `i`.
        read_logits: maps an index into the first two dimensions to logits, so that the output
            projection runs only where logits are wanted.
    """

    last_hidden_state: torch.Tensor
    read_logits: Callable[[Index | None], torch.Tensor]

    def logits(self, index: Index | None = None) -> torch.Tensor:
        """Logits `[..., vocab]` at `index` (as in `x[index]`); by default of all positions."""
        return self.read_logits(index)

    def shifted(self, attention_mask: torch.Tensor | None = None) -> BackboneStates:
        """The states of a next-token predictor, lined up with the tokens that they predict.

        Entry `i` becomes entry `i - 1`. A row's first real position, which no other predicts, keeps
        its own, as in Dream's code.

        Args:
            attention_mask: `[batch, length]`, 0 at padding; what follows padding is first.
        """
        batch, length = self.last_hidden_state.shape[:2]
        device = self.last_hidden_state.device
        row = torch.arange(batch, device=device)[:, None].expand(-1, length)
        position = torch.arange(length, device=device).expand(batch, -1)
        source = (position - 1).clamp(min=0)
        if attention_mask is not None:
            source = torch.where(attention_mask.gather(1, source).bool(), source, position)

        def read_logits(index: Index | None) -> torch.Tensor:
            at = (row, source) if index is None else (row[index], source[index])
            return self.logits(at)

        return BackboneStates(self.last_hidden_state[row, source], read_logits)


class BackboneFamily(ABC):
    """Builds and reads one family of backbones.

    Attributes:
        unused_weights: a pattern of the names of weights that a checkpoint may hold and that
            denoising does not need; None if all are needed.
    """

    unused_weights: str | None = None

    @abstractmethod
    def matches(self, config: PretrainedConfig) -> bool:
        """Whether a model with this configuration belongs to the family."""

    def adopt(self, config: PretrainedConfig) -> None:  # noqa: B027
        """Changes what must be changed in a configuration (or a loaded model's) to run in CoDD."""

    @abstractmethod
    def from_config(self, config: PretrainedConfig, **kwargs) -> PreTrainedModel:
        """A randomly initialised backbone."""

    @abstractmethod
    def from_pretrained(
        self, name_or_path: str, config: PretrainedConfig, **kwargs
    ) -> PreTrainedModel:
        """A pretrained backbone; `kwargs` go to transformers' `from_pretrained`."""

    @abstractmethod
    def run(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> BackboneStates:
        """One forward pass of `model` on `[batch, length]` tokens.

        Entry `i` of what it returns is what the model computes at position `i`. `attention_mask` is
        `[batch, length]`, 0 at padding, or `[batch, 1, length, length]`, additive.
        """

    def max_positions(self, model: PreTrainedModel) -> int | None:
        """How many tokens a row may have; None where nothing bounds it."""
        return getattr(model.config, "max_position_embeddings", None)

    def make_cache(self, model: PreTrainedModel, num_rows: int) -> CanvasCache:
        """An empty cache for passes over parts of a canvas; `run` then takes it as `cache`.

        Args:
            model: the backbone.
            num_rows: rows of the batch.

        Raises:
            ValueError: the model cannot be read in parts.
        """
        raise ValueError(
            f"`cache` needs a decoder that transformers runs (as llama and qwen2), got the model "
            f"type {model.config.model_type!r}: leave `cache` out."
        )

    def save_code(self, model: PreTrainedModel, folder: str | Path) -> None:  # noqa: B027
        """Copies into `folder` what is needed, beside weights, to load `model` from there."""

    def states(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: CanvasCache | None = None,
    ) -> BackboneStates:
        """Runs `model` so that entry `i` of the result predicts token `i`.

        Every position sees all unpadded ones or, if the configuration has a `block_length`, those
        of its own block and of earlier ones.

        Args:
            model: the backbone.
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`, 0 at padding.
            position_ids: `[batch, length]`; default, counted from the left end.
            cache: from `make_cache`, with a pass announced: what it does not compute is as it was
                when it was last computed.

        Raises:
            ValueError: the attention implementation cannot be block-causal.
        """
        visible, block_length = attention_mask, getattr(model.config, "block_length", None)
        if block_length is not None:
            implementation = model.config._attn_implementation or "eager"
            if implementation.startswith(("flash", "flex", "paged")):
                raise ValueError(
                    f"`attn_implementation` must be 'sdpa' or 'eager' for block-causal attention "
                    f"(`block_length={block_length}`), got {implementation!r}."
                )
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            visible = block_causal_mask(real, block_length, model.dtype)
            if cache is not None and cache.positions is not None:
                row = torch.arange(len(real), device=real.device)[:, None]
                visible = visible[row, :, cache.positions].transpose(1, 2)
        cached = {} if cache is None else {"cache": cache}
        states = self.run(model, input_ids, visible, position_ids, **cached)
        shift = getattr(model.config, "logit_shift", False)
        return states.shifted(attention_mask) if shift else states


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device that a backbone takes its tokens on, also while its weights are offloaded."""
    embedding = model.get_input_embeddings()
    if not hasattr(embedding, "_hf_hook"):
        return embedding.weight.device
    # Offloaded weights are on no device until a hook fetches them: where, the result shows.
    return embedding(torch.zeros(1, dtype=torch.long)).device
